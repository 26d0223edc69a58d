"""train.py, or lab.replay after "replay", several times in one start of the ranks: words of each, "+" between."""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.config import load_config
from core.errors import command
from lab.replay import show
from train import train


@command
def main() -> None:
    for is_next, words in groupby(sys.argv[1:], lambda word: word == "+"):
        if not is_next:
            first, *rest = words
            show(rest) if first == "replay" else train(load_config([first, *rest]))


if __name__ == "__main__":
    main()
