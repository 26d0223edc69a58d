"""prepare_fineweb.py on a disk that another process fills (the file named by FILLER) when the second shard is begun."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from filler import fill

import prepare_fineweb
from text import token_stream

begin = token_stream.ShardWriter.__init__


def fill_then_begin(shard, path, capacity):
    if path.name == "train_000002.bin":
        fill(Path(os.environ["FILLER"]), leave=3 << 20)  # half a shard's
    begin(shard, path, capacity)


if __name__ == "__main__":
    token_stream.ShardWriter.__init__ = fill_then_begin
    prepare_fineweb.main()
