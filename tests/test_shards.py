"""Shards against a reader and a writer of llm.c's format that know nothing but `struct`."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.files import atomic_write, sha256_file, write_json
from text.shard_writer import ShardWriter, write_shard
from text.shards import MANIFEST, find_shards, open_shard, read_manifest

ROOT = Path(__file__).parent.parent


def pack(tokens, magic=20240520, version=1, n=None):
    """The bytes of a shard as llm.c lays them out."""
    return struct.pack("<256i", magic, version, len(tokens) if n is None else n, *[0] * 253) + struct.pack(
        f"<{len(tokens)}H", *tokens
    )


ids = st.lists(st.integers(0, 65535), min_size=1, max_size=50)


@settings(max_examples=30, deadline=None)
@given(tokens=ids)
def test_format_is_llm_c(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "train_000001.bin"
    digest = write_shard(path, np.array(tokens, dtype=np.uint16))
    assert path.read_bytes() == pack(tokens)
    assert digest == sha256_file(path) == hashlib.sha256(pack(tokens)).hexdigest()
    assert open_shard(path).tolist() == tokens


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(ids, min_size=1, max_size=5), room=st.integers(0, 3))
def test_in_parts_as_at_once(tmp_path_factory, parts, room):
    folder, tokens = tmp_path_factory.mktemp("shard"), [token for part in parts for token in part]
    writer = ShardWriter(folder / "a.bin", len(tokens) + room)
    for part in parts:
        assert writer.write(np.array(part, dtype=np.uint16)) == len(part)
    assert writer.full == (room == 0)
    digest = writer.close()
    assert (folder / "a.bin").read_bytes() == pack(tokens)
    assert digest == sha256_file(folder / "a.bin")
    assert [p.name for p in folder.iterdir()] == ["a.bin"]


def test_no_more_than_the_capacity(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", 3)
    assert writer.write(np.arange(2, dtype=np.uint16)) == 2
    assert writer.write(np.arange(5, dtype=np.uint16)) == 1
    assert writer.full
    assert not (tmp_path / "a.bin").exists(), "a shard appears when it is whole"
    writer.close()
    assert open_shard(tmp_path / "a.bin").tolist() == [0, 1, 0]


def test_abort_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", 3)
    writer.write(np.arange(2, dtype=np.uint16))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_file_too_large_is_named(tmp_path):
    """The system's limit on a file's size stands for a full disk; nothing is left."""
    code = "import resource, numpy as np; from text import shard_writer; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    code += f"shard_writer.write_shard({str(tmp_path / 'a.bin')!r}, np.zeros(100_000, dtype=np.uint16))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"UserError: {tmp_path / 'a.bin'}: cannot be written (File too large)" in process.stderr
    assert not list(tmp_path.iterdir())


def test_atomic_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.json") as file:
        file.write(b"half of it" * (1 // 0))
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert len(list(tmp_path.iterdir())) == 1


def test_npy_shards_of_build_nanogpt(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([50256, 15496, 995], dtype=np.uint16))
    [path] = find_shards(tmp_path, "train")
    assert open_shard(path).tolist() == [50256, 15496, 995]


REFUSED = {
    "header cut off": ("a.bin", pack([1])[:1000], "1000 bytes, shorter than a shard's 1024-byte header"),
    "empty": ("a.bin", b"", "0 bytes, shorter"),
    "magic": ("a.bin", pack([1], magic=7), "not a token shard (magic 7, expected 20240520)"),
    "version": ("a.bin", pack([1], version=2), "shard version 2, this code reads version 1"),
    "truncated": ("a.bin", pack([1, 2, 3])[:-2], "its header promises 3 tokens = 1030 bytes"),
    "too long": ("a.bin", pack([1, 2, 3], n=2), "its header promises 2 tokens = 1028 bytes"),
    "negative": ("a.bin", pack([], n=-5), "its header promises -5 tokens"),
    "no tokens": ("a.bin", pack([]), "holds no tokens"),
    "missing": ("a.bin", None, "cannot be read (No such file or directory)"),
    "missing npy": ("a.npy", None, "cannot be read (No such file or directory)"),
    "no npy": ("a.npy", pack([1]), "not a readable .npy shard"),
    "empty npy": ("a.npy", b"", "not a readable .npy shard"),
    "int32": ("a.npy", np.array([1], dtype=np.int32), "found int32 of shape (1,)"),
    "matrix": ("a.npy", np.ones((2, 2), dtype=np.uint16), "found uint16 of shape (2, 2)"),
    "nothing in it": ("a.npy", np.array([], dtype=np.uint16), "found uint16 of shape (0,)"),
    "objects": ("a.npy", np.array([{}], dtype=object), "not a readable .npy shard"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    name, content, expected = REFUSED[case]
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content, allow_pickle=True)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_shard(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert expected in str(caught.value)


def test_find_shards(tmp_path):
    for name in ("x_train_000010.bin", "x_train_000002.bin", "x_val_000000.bin", ".x_train_000003.bin", "train.txt"):
        (tmp_path / name).write_bytes(pack([1]))
    assert [p.name for p in find_shards(tmp_path, "train")] == ["x_train_000002.bin", "x_train_000010.bin"]
    assert [p.name for p in find_shards(tmp_path, "val")] == ["x_val_000000.bin"]
    with pytest.raises(UserError, match=r"no \*test\*.bin or"):
        find_shards(tmp_path, "test")
    with pytest.raises(UserError, match=r"no such data folder; `python prepare_fineweb.py --out"):
        find_shards(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"`python prepare_fineweb.py --source demo --out .*/demo` makes it"):
        find_shards(tmp_path / "demo", "train")


@pytest.mark.parametrize("text", ["{", "[]", '{"tokens": 3}', "\udcff"])
def test_damaged_manifest(tmp_path, text):
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="unreadable manifest"):
        read_manifest(tmp_path)
