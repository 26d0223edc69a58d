"""train.py several times in one start of the ranks, which takes longer than a small run: words of each run, "+" between."""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.config import load_config
from core.errors import command
from train import train


@command
def main() -> None:
    for is_next, words in groupby(sys.argv[1:], lambda word: word == "+"):
        if not is_next:
            train(load_config(list(words)))


if __name__ == "__main__":
    main()
