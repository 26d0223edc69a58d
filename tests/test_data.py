"""Batches are a pure function of (step, micro-step, rank), and damaged data is refused by name."""

import json
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import Config
from core.data import Batches, TokenStream
from core.errors import UserError
from text.shard_writer import write_shard
from text.shards import HEADER_BYTES, open_shard


def make_shards(folder, sizes) -> np.ndarray:
    """Training shards of `sizes` holding 0, 1, 2, … and a validation shard; returns the training tokens."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.bin"):
        old.unlink()
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    for i, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        write_shard(folder / f"train_{i + 1:06d}.bin", part)
    write_shard(folder / "val_000000.bin", tokens[:10])
    return tokens


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5), length=st.sampled_from([1, 4, 8]),
    rows=st.sampled_from([4, 8, 12]), split=st.sampled_from([(1, 1), (1, 2), (2, 2), (4, 1), (1, 4)]), step=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ranks_and_micro_steps_only_slice_the_range_of_the_step(tmp_path_factory, sizes, length, rows, split, step):
    folder = tmp_path_factory.getbasetemp() / "hypothesis"
    tokens = make_shards(folder, sizes)
    micro_batch, world_size = split
    n = rows * length
    cfg = Config(data=str(folder), block_size=length, micro_batch=micro_batch, tokens_per_step=n, n_embd=8, n_head=1)
    ranks = [
        SimpleNamespace(rank=r, world_size=world_size, device=torch.device("cpu"), at=lambda _: None) for r in range(world_size)
    ]
    batches = [Batches(cfg, "train", rank) for rank in ranks]
    pairs = [b[step, micro] for micro in range(batches[0].grad_accum) for b in batches]
    expected = tokens[np.arange(step * n, (step + 1) * n + 1) % len(tokens)]
    assert torch.cat([x for x, _ in pairs]).flatten().tolist() == expected[:-1].tolist()
    assert torch.cat([y for _, y in pairs]).flatten().tolist() == expected[1:].tolist()
    assert all(x.shape == y.shape == (micro_batch, length) for x, y in pairs)


@pytest.mark.slow
def test_more_shards_than_files_a_process_may_open(tmp_path):
    """What is read again, later, must still be the same file."""
    tokens = make_shards(tmp_path, [3] * 1100)
    code = "import sys, resource; from core import data; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); "
    code += "s = data.TokenStream(sys.argv[1], 'train', 2**16); s.verify(); print(*s.read(0, len(s)))"
    done = run_command("-c", code, tmp_path)
    assert done.returncode == 0 and done.stdout.split() == list(map(str, tokens)), done.stderr
    stream = TokenStream(tmp_path, "train", 2**16)
    stream.read(0, len(stream))
    write_shard(stream.paths[0], np.array([7, 7, 7], dtype=np.uint16))
    with pytest.raises(UserError, match=r"train_000001.bin: was changed while it was in use"):
        stream.read(0, 3)


def loader(folder, ahead: bool, **changes) -> Batches:
    """Batches of 2 × 4 tokens, two to a step, for the only rank there is."""
    sizes = {"block_size": 4, "micro_batch": 2, "tokens_per_step": 16, "n_embd": 8, "n_head": 1} | changes
    rank = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), at=lambda _: None)
    return Batches(Config(data=str(folder), **sizes), "train", rank, ahead=ahead)


@given(indices=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=30), ordered=st.booleans())
@settings(max_examples=30, deadline=None)
def test_reading_ahead_returns_what_is_asked_for_in_whatever_order(tmp_path_factory, indices, ordered):
    make_shards(folder := tmp_path_factory.getbasetemp() / "ahead", [30, 47])
    plain, ahead = loader(folder, False), loader(folder, True)
    for index in sorted(set(indices)) if ordered else indices:
        for one, other in zip(plain[index], ahead[index], strict=True):
            assert torch.equal(one, other)


def test_the_next_batch_is_read_ahead_and_refused_only_when_asked_for(tmp_path):
    make_shards(tmp_path / "d", [100])
    batches, readers = loader(tmp_path / "d", True, vocab_size=35), {}
    read = batches.stream.read

    def noted(start, count):
        readers[start] = threading.current_thread()
        return read(start, count)

    batches.stream.read = noted
    for index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        batches[index]
    assert [readers[start] is threading.main_thread() for start in (0, 8, 16, 24)] == [True, False, False, False]
    for _ in range(2):  # the batch read ahead is (2, 0); it reaches id 35 and so does a second look at it
        with pytest.raises(UserError, match=r"train_000001.bin: token 40 is 40, beyond vocab_size = 35"):
            batches[2, 0]
    assert batches[0, 1][0][0, 0] == 8


def test_an_id_beyond_the_vocabulary_is_named(tmp_path):
    make_shards(tmp_path / "d", [40, 50])
    stream = TokenStream(tmp_path / "d", "train", 60)
    stream.read(0, 60)
    with pytest.raises(UserError, match=r"train_000002.bin: token 29 is 69, beyond vocab_size = 60"):
        stream.read(35, 35)


def damage(corpus, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(corpus, folder)
    change(folder)
    with pytest.raises(UserError) as error:
        TokenStream(folder, "train", 320).read(0, 100)
    return str(error.value)


def edit(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: (f / "train_000002.bin").unlink(), ["train_000002.bin", "no tokens", "50000"]),
        (
            lambda f: (f / "train_000002.bin").write_bytes((f / "train_000002.bin").read_bytes()[:-3]),
            ["train_000002.bin", "truncated"],
        ),
        (lambda f: (f / "train_000002.bin").write_bytes(b"x" * 4000), ["train_000002.bin", "magic"]),
        (lambda f: (f / "train_000002.bin").write_bytes(b""), ["train_000002.bin", "0 bytes", str(HEADER_BYTES)]),
        (lambda f: write_shard(f / "train_000009.bin", np.zeros(5)), ["train_000009.bin", "no such shard"]),
        (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json", "unreadable"]),
        (lambda f: edit(f, n_vocab=50257, tokenizer="gpt2"), ["50257", "vocab_size = 320"]),
        (shutil.rmtree, ["no such data folder", "prepare_fineweb.py"]),
    ],
)
def test_damaged_data_is_refused_by_name(corpus, tmp_path, change, parts):
    message = damage(corpus, tmp_path, change)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_shards_without_a_manifest_are_gpt2s(tmp_path):
    make_shards(tmp_path / "d", [40])
    assert TokenStream(tmp_path / "d", "train", 50304).tokenizer == "gpt2"
    assert len(open_shard(tmp_path / "d" / "train_000001.bin")) == 40
