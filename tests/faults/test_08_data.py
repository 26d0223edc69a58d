"""A damaged or a changed shard is named in one line before a step is taken on it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_run, logged, run_command

from core.checkpoint import list_checkpoints, newest_checkpoint
from core.config import load_config
from core.errors import UserError
from text.shard_writer import write_shard
from text.shards import HEADER_BYTES, HEADER_INTS, MAGIC, MANIFEST, VERSION, open_shard
from train import train

SIZES = {"val_000000": 3000, "train_000001": 5000, "train_000002": 4000, "train_000003": 2000}
SAVE = {".bin": write_shard, ".npy": np.save}
VOCAB = 320  # of the configuration `small`


def tokens_of(name: str) -> np.ndarray:
    """The tokens of a shard, bytes of text, the same ones whenever they are asked for."""
    return np.random.default_rng(list(SIZES).index(name)).integers(0, 256, SIZES[name], dtype=np.uint16)


def make_data(folder: Path, kind: str = ".bin") -> Path:
    """A folder of one validation and three training shards, without a manifest."""
    folder.mkdir()
    for name in SIZES:
        SAVE[kind](folder / f"{name}{kind}", tokens_of(name))
    return folder


def refusal(words: list[str]) -> str:
    """What training says where it refuses, one line."""
    with pytest.raises(UserError) as caught:
        train(load_config(words))
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---------------------------------------------------------------- damaged shards

Damage = Callable[[Path], object]


def keep(n: int) -> Damage:
    """Only the first n bytes, or all but the last −n."""
    return lambda path: path.write_bytes(path.read_bytes()[:n])


def extend(n: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes() + bytes(n))


def header(**fields: int) -> Damage:
    """Another header before the same tokens."""

    def change(path: Path) -> None:
        values = {"magic": MAGIC, "version": VERSION, "n": len(tokens_of(path.stem))} | fields
        body = path.read_bytes()[HEADER_BYTES:]
        path.write_bytes(struct.pack(f"<{HEADER_INTS}i", *values.values(), *[0] * (HEADER_INTS - 3)) + body)

    return change


def replace(old: bytes, new: bytes) -> Damage:
    def change(path: Path) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return change


def array(make: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """The tokens as another array, in numpy's form."""

    def change(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, make(tokens_of(path.stem)), allow_pickle=True)

    return change


def archive(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, tokens_of(path.stem))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def four_bytes_each(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + tokens_of(path.stem).astype("<u4").tobytes())


EITHER: dict[str, tuple[Damage, str]] = {
    "empty": (keep(0), ""),
    "cut off in the header": (keep(100), ""),
    "odd-sized: a byte short": (keep(-1), ""),
    "a token short": (keep(-2), ""),
    "odd-sized: a byte too long": (extend(1), " bytes, but its header promises "),
    "a token too long": (extend(2), " bytes, but its header promises "),
    "a folder": (become_folder, "cannot be read (Is a directory)"),
}
DAMAGES: dict[str, dict[str, tuple[Damage, str]]] = {
    ".bin": EITHER
    | {
        "half of it": (lambda path: keep(path.stat().st_size // 2)(path), "truncated or damaged"),
        "wrong magic": (header(magic=20240521), "not a token shard (magic 20240521, expected 20240520)"),
        "wrong version": (header(version=2), "shard version 2, this code reads version 1"),
        "header of one token more": (lambda path: header(n=SIZES[path.stem] + 1)(path), "truncated or damaged"),
        "header of one token less": (lambda path: header(n=SIZES[path.stem] - 1)(path), "truncated or damaged"),
        "header of a negative number": (header(n=-1), "its header promises -1 tokens"),
        "no tokens": (lambda path: write_shard(path, np.empty(0)), "holds no tokens"),
        "wrong dtype: four bytes a token": (four_bytes_each, "truncated or damaged"),
        "big-endian": (lambda path: path.write_bytes(np.fromfile(path, "<u2").astype(">u2").tobytes()), "not a token shard"),
        "an .npy file": (array(lambda tokens: tokens), "not a token shard"),
        "text": (lambda path: path.write_text("x" * 5000), "not a token shard"),
    },
    ".npy": EITHER
    | {
        "half of it": (lambda path: keep(path.stat().st_size // 2)(path), "not a readable .npy shard"),
        "wrong magic": (replace(b"\x93NUMPY", b"\x93NUMPI"), "not a readable .npy shard (the magic string is not correct"),
        "wrong version": (replace(b"NUMPY\x01", b"NUMPY\x09"), "not a readable .npy shard (we only support format version"),
        "header of a larger number": (replace(b"000,)", b"001,)"), "not a readable .npy shard"),
        "header of a smaller number": (replace(b"000,)", b"00,) "), "but its header promises"),
        "header of a negative number": (replace(b"(", b"(-"), "not a readable .npy shard"),
        "header of a number beyond all bounds": (replace(b" (", b"(" + b"9" * 20), "not a readable .npy shard"),
        "no tokens": (array(lambda tokens: tokens[:0]), "found uint16 of shape (0,)"),
        "wrong dtype: uint32": (array(lambda tokens: tokens.astype("<u4")), "found uint32"),
        "wrong dtype: int16": (array(lambda tokens: tokens.astype("<i2")), "found int16"),
        "wrong dtype: uint8": (array(lambda tokens: tokens.astype("u1")), "found uint8"),
        "wrong dtype: float16": (array(lambda tokens: tokens.astype("<f2")), "found float16"),
        "wrong dtype: objects": (array(lambda tokens: tokens.astype(object)), "not a readable .npy shard"),
        "big-endian": (array(lambda tokens: tokens.astype(">u2")), "found >u2"),
        "a matrix": (array(lambda tokens: tokens.reshape(2, -1)), "of shape (2, "),
        "an .npz archive": (archive, "not a readable .npy shard"),
        "a .bin file": (lambda path: write_shard(path, tokens_of(path.stem)), "not a readable .npy shard"),
    },
}


@pytest.mark.parametrize(("kind", "damage"), [(kind, damage) for kind in DAMAGES for damage in DAMAGES[kind]])
def test_a_damaged_shard_is_named_before_training_begins(fault, small, tmp_path, kind, damage):
    happened = fault(f"a {kind} shard, of training or of validation: {damage}")
    change, expected = DAMAGES[kind][damage]
    for number, name in enumerate(["train_000002", "val_000000"]):
        path = make_data(tmp_path / f"data{number}", kind) / f"{name}{kind}"
        change(path)
        message = refusal([*small, f"--data={path.parent}", "--name=r"])
        assert message.startswith(f"{path}: ") and expected in message
    assert not (tmp_path / "r").exists()
    happened(f"named, one line, no run begun: {message.split(': ', 1)[1]}", shards=2)


def test_the_command_says_it_in_one_line_with_exit_code_2(fault, small, tmp_path):
    happened = fault("train.py started on a truncated shard")
    keep(-7)(path := make_data(tmp_path / "data") / "train_000003.bin")
    done = run_command("train.py", *small, f"--data={path.parent}", "--name=r")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {path}: 5017 bytes, but its header promises 2000 tokens = 5024 bytes")
    happened("exit code 2, one line that names file, size and promise")


def test_a_validation_of_one_token_is_refused(fault, small, tmp_path):
    happened = fault("a validation shard of a single token, with which nothing can be predicted")
    path = make_data(tmp_path / "data") / "val_000000.bin"
    write_shard(path, tokens_of("val_000000")[:1])
    assert refusal([*small, f"--data={path.parent}"]).startswith(f"{path}: one token")
    happened("named, one line")


def test_a_name_that_cannot_be_printed_is_refused(fault, small, tmp_path):
    happened = fault("shards whose names hold a line break, a terminal's escape sequence, bytes that are not UTF-8")
    names = [b"train_\n.bin", b"train_\x1b[2J.bin", b"train_\xff.bin"]
    for number, name in enumerate(names):
        folder = make_data(tmp_path / f"data{number}")
        (folder / "train_000003.bin").rename(folder / os.fsdecode(name))
        assert "is no name for a shard" in refusal([*small, f"--data={folder}"])
    happened("refused in one line that spells the name out", names=len(names))


@pytest.mark.parametrize("change", ["missing", "not listed", "of another size", "of a larger vocabulary", "not JSON"])
def test_a_folder_that_does_not_fit_its_manifest_is_refused(fault, corpus, small, tmp_path, change):
    happened = fault(f"manifest.json and shards do not fit: {change}")
    folder = Path(shutil.copytree(corpus, tmp_path / "data"))
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / "train_000002.bin"
    if change == "missing":
        path.unlink()
    elif change == "not listed":
        shutil.copy(path, path := folder / "train_000009.bin")
    elif change == "of another size":
        write_shard(path, tokens_of("train_000001"))
    elif change == "of a larger vocabulary":
        (path := folder / MANIFEST).write_text(json.dumps(manifest | {"n_vocab": VOCAB + 1}))
    else:
        keep(-9)(path := folder / MANIFEST)
    message = refusal([*small, f"--data={folder}"])
    assert message.startswith(f"{folder if change == 'of a larger vocabulary' else path}: ")
    happened(f"named, one line: {message.split(': ', 1)[1]}")


# ---------------------------------------------------------------- damage that only reading finds


def patch(path: Path, token: int, value: int) -> None:
    """Overwrite one token of a .bin shard; its size stays."""
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 2 * token)
        file.write(struct.pack("<H", value))


def test_an_id_beyond_the_vocabulary(fault, corpus, small, tmp_path):
    happened = fault("one token of 130,000 is 40,000 where the vocabulary has 320")
    path = Path(shutil.copytree(corpus, tmp_path / "data")) / "train_000001.bin"
    words = [*small, f"--data={path.parent}", "--save_every=2"]
    train(load_config([*words, "--name=whole"]))
    token = 5 * 512 + 17  # of step 5: a step has 512
    was = int(open_shard(path)[token])
    patch(path, token, 40_000)
    expected = f"{path}: token {token} is 40000, beyond vocab_size = {VOCAB}"
    assert refusal([*words, "--name=full", "--verify_data=full"]) == expected
    assert not (tmp_path / "full").exists()
    assert refusal([*words, "--name=quick"]) == expected
    assert newest_checkpoint(tmp_path / "quick")[1].step == 4
    patch(path, token, was)
    train(load_config([*words, "--name=quick"]))
    assert_same_run(tmp_path / "quick", tmp_path / "whole")
    happened("full: named before the first step; quick: named at step 5; the file repaired, the run ended as one undisturbed")


def test_an_id_beyond_the_vocabulary_in_the_validation_shard(fault, small, tmp_path):
    happened = fault("a token beyond the vocabulary in the validation shard")
    path = make_data(tmp_path / "data") / "val_000000.bin"
    patch(path, 1234, VOCAB)
    for check in ("quick", "full"):
        message = refusal([*small, f"--data={path.parent}", f"--verify_data={check}", f"--name={check}"])
        assert message == f"{path}: token 1234 is {VOCAB}, beyond vocab_size = {VOCAB}"
        assert logged(tmp_path / check) == 0
    happened("full: named before the first step; quick: named by the first validation, before the first update")


@pytest.mark.parametrize("name", ["train_000002.bin", "val_000000.bin"])
def test_a_flipped_bit_is_found_by_the_manifests_sha256(fault, corpus, small, tmp_path, name):
    happened = fault(f"one bit of {name} flipped, size and ids in order")
    path = Path(shutil.copytree(corpus, tmp_path / "data")) / name
    words = [*small, f"--data={path.parent}"]
    assert train(load_config([*words, "--verify_data=full", "--name=whole", "--steps=1", "--warmup_steps=0"])) == 0
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 2 * 777] ^= 1
    path.write_bytes(data)
    assert refusal([*words, "--verify_data=full", "--name=r"]).startswith(f"{path}: its sha256 is not the manifest's")
    assert not (tmp_path / "r").exists()
    assert train(load_config([*words, "--name=r", "--steps=1", "--warmup_steps=0"])) == 0
    happened("full: named before the first step; quick, which reads headers and sizes only, does not see it")


# ---------------------------------------------------------------- changed between start and resume


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with `data`, a run `whole` on it, and the same run `r`, left at step 4 of 8."""
    home = tmp_path_factory.mktemp("begun")
    make_data(home / "data")
    train(load_config([*words_of(home), "--name=whole"]))
    shutil.copytree(home / "whole", home / "r")
    shutil.rmtree(home / "r/checkpoints/step_000008")
    return home


def words_of(home: Path) -> list[str]:
    return [
        f"--data={home / 'data'}", f"--out_dir={home}", "--name=r", "--device=cpu", "--dtype=float32", "--n_layer=1",
        "--n_head=2", "--n_embd=16", "--vocab_size=320", "--block_size=32", "--micro_batch=4", "--tokens_per_step=512",
        "--steps=8", "--warmup_steps=2", "--lr=1e-2", "--eval_every=4", "--eval_tokens=1000", "--final_eval_tokens=1000",
        "--save_every=4",
    ]  # fmt: skip


@pytest.fixture
def home(begun: Path, tmp_path: Path) -> Path:
    """A copy of it to change, times of change as they were."""
    return Path(shutil.copytree(begun, tmp_path / "home"))


def swap(folder: Path) -> None:
    (folder / "train_000001.bin").rename(folder / "x")
    (folder / "train_000002.bin").rename(folder / "train_000001.bin")
    (folder / "x").rename(folder / "train_000002.bin")


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a token of training": (lambda f: patch(f / "train_000003.bin", 100, 7), "train_000003.bin", "its sha256 is another"),
    "a token of validation": (lambda f: patch(f / "val_000000.bin", 2999, 7), "val_000000.bin", "its sha256 is another"),
    "two shards of other lengths swapped": (swap, "train_000001.bin", "4000 tokens, the run began with 5000"),
    "a shard made longer": (
        lambda f: write_shard(f / "train_000003.bin", tokens_of("train_000001")), "r", "train_tokens = 11000 (now 14000)",
    ),
    "the validation shard made longer": (
        lambda f: write_shard(f / "val_000000.bin", tokens_of("train_000001")), "val_000000.bin", "the run began with 3000",
    ),
    "a training shard removed": (lambda f: (f / "train_000002.bin").unlink(), "r", "train_tokens = 11000 (now 7000)"),
    "a training shard added": (
        lambda f: write_shard(f / "train_000004.bin", tokens_of("train_000001")), "r", "train_tokens = 11000 (now 16000)",
    ),
    "the validation shard removed": (lambda f: (f / "val_000000.bin").unlink(), "data", "no *val*.bin or *val*.npy shard"),
    "a validation shard added": (
        lambda f: write_shard(f / "val_000001.bin", tokens_of("train_000001")), "val_000001.bin", "was not there",
    ),
    "a training shard renamed": (
        lambda f: (f / "train_000002.bin").rename(f / "train_000012.bin"),
        "train_000002.bin", "no tokens, the run began with 4000",
    ),
    "a training shard replaced by the same in .npy": (
        lambda f: (np.save(f / "train_000002.npy", tokens_of("train_000002")), (f / "train_000002.bin").unlink()),
        "train_000002.bin", "no tokens, the run began with 4000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_changed_between_start_and_resume_is_refused(fault, home, change):
    happened = fault(f"between start and resume: {change}")
    alter, named, expected = CHANGES[change]
    alter(home / "data")
    before = {path: path.stat().st_mtime_ns for path in (home / "r").rglob("*") if path.is_file()}
    message = refusal(words_of(home))
    assert message.split(": ", 1)[0].endswith(f"/{named}") and expected in message
    assert before == {path: path.stat().st_mtime_ns for path in (home / "r").rglob("*") if path.is_file()}
    happened(f"refused, the run folder as it was: {message.split(': ', 1)[1].replace(f'{home}/', '')}")


def copy_anew(folder: Path) -> None:
    """Other files of the same bytes, as `cp -r` makes them."""
    shutil.copytree(folder, folder.with_name("new"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name("new").rename(folder)


def touch_all(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path)


@pytest.mark.parametrize("change", [touch_all, copy_anew])
def test_shards_that_are_touched_or_copied_are_accepted(fault, home, change):
    happened = fault(f"between start and resume: all shards {'touched' if change is touch_all else 'copied, equal bytes'}")
    times = {path: path.stat().st_mtime_ns for path in (home / "data").iterdir()}
    change(home / "data")
    assert all(path.stat().st_mtime_ns != at for path, at in times.items())
    assert train(load_config(words_of(home))) == 0
    assert_same_run(home / "r", home / "whole")
    now = {shard.file: shard.mtime_ns for shard in newest_checkpoint(home / "r")[1].shards}
    assert now == {path.name: path.stat().st_mtime_ns for path in (home / "data").iterdir()}, "read once, not at every start"
    happened("read, accepted, and the run ended bit for bit as one undisturbed; the new times are remembered")


def test_a_change_that_hides_its_time_is_found_by_a_full_check(fault, home):
    happened = fault("between start and resume: a token changed, then the file's time of change put back, no manifest")
    path = home / "data/train_000003.bin"
    at = path.stat().st_mtime_ns
    patch(path, 100, 7)
    os.utime(path, ns=(at, at))
    assert refusal([*words_of(home), "--verify_data=full"]).startswith(f"{path}: was changed since the run began")
    assert [p.name for p in list_checkpoints(home / "r")] == ["step_000004"]
    assert train(load_config(words_of(home))) == 0
    happened("full: refused; quick, which trusts size and time, does not see it")


def test_a_shard_put_back_lets_the_run_go_on(fault, home):
    happened = fault("a changed shard, refused, then put back")
    path = home / "data/train_000003.bin"
    patch(path, 100, 7)
    assert "its sha256 is another" in refusal(words_of(home))
    write_shard(path, tokens_of(path.stem))
    assert train(load_config(words_of(home))) == 0
    assert_same_run(home / "r", home / "whole")
    happened("the run ended bit for bit as one undisturbed")
