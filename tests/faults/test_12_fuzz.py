"""Whatever is written into a file or a word of the command line is taken or refused in one line, never answered by a traceback.

Each test draws mutations of something valid. They are of two kinds: of bytes, and of the structure that the bytes stand for,
since a parser refuses most random bytes before the code behind it sees anything.
"""

import copy
import hashlib
import json
import shutil
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    State,
    load_model,
    load_optimizer,
    optimizer_tensors,
    sealed,
    write_checkpoint,
)
from core.config import Config, load_config, to_toml
from core.data import ShardRecord, TokenStream
from core.errors import UserError
from core.files import locked, sha256_file
from core.optim import make_optimizer
from model import GPT
from positional import ENCODINGS
from text.shard_writer import write_shard
from text.shards import HEADER_INTS, MAGIC, MANIFEST, VERSION, open_shard
from text.token_stream import PROGRESS, intact, read_earlier

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]  # a value that makes a loop endless is a bug, too


def fuzz(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck))


class Tally:
    """Counts what became of the examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def outcome(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, or None where it refuses in one line; anything else fails the test."""
        message = result = None
        try:
            result = call()
        except UserError as error:
            message = str(error)
        if message is not None:
            assert message and not any(unicodedata.category(c) == "Cc" for c in message), repr(message)
        self.counts["taken" if message is None else "refused"] += 1
        return result

    def __str__(self) -> str:
        return f"{self.counts['taken']} taken, {self.counts['refused']} refused in one line, no traceback"

    @property
    def figures(self) -> dict[str, int]:
        return {"examples": self.counts.total(), "taken": self.counts["taken"], "refused": self.counts["refused"]}


# ---------------------------------------------------------------- mutations

BYTE_EDIT = st.tuples(
    st.sampled_from(["set", "flip", "insert", "delete", "cut", "double"]), st.integers(0, 2**16), st.integers(0, 255)
)
FLIPS = st.lists(st.tuples(st.just("flip"), st.integers(0, 2**16), st.integers(0, 7)), min_size=1, max_size=2)  # sizes stay
BYTE_EDITS = FLIPS | st.lists(BYTE_EDIT, min_size=1, max_size=4)


def edit_bytes(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """`data` after the edits, each at its place modulo the length."""
    out = bytearray(data)
    for kind, place, value in edits:
        at = place % max(1, len(out))
        if kind == "cut":
            del out[at:]
        elif kind == "delete":
            del out[at : at + 1 + value % 8]
        elif kind == "insert":
            out.insert(at, value)
        elif kind == "double":
            out[at:at] = out[at : at + value]
        elif out:
            out[at] = value if kind == "set" else out[at] ^ (1 << value % 8)
    return bytes(out)


ODD_TEXT = [
    "",
    ".",
    "..",
    "a/b",
    "/etc/passwd",
    "../x",
    "a\nb",
    "\0",
    "\x1b[2J",
    "é\u2028\U0001f600",
    "x" * 300,
    "auto",
    "rope",
]
ODD_INT = [0, 1, -1, 2, 3, 255, 2**16, 2**31, 2**40, 2**63, 2**64, 10**30]
ODD_FLOAT = [0.0, -0.0, 1.0, 0.5, 1e-300, 1e300, -1.0]
TEXT = st.sampled_from(ODD_TEXT) | st.text(max_size=10)
NUMBER = st.sampled_from(ODD_INT) | st.integers() | st.sampled_from(ODD_FLOAT) | st.floats()
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
JSON = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=4)
JSON_EDIT = st.tuples(st.sampled_from(["set", "delete", "rename", "repeat"]), st.integers(0, 2**16), TEXT, JSON)
JSON_EDITS = st.lists(JSON_EDIT, min_size=1, max_size=3)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def place_of(value: Any, key: str) -> int:
    """The number of the first place called `key`, for edit_json."""
    return [name for _, name in places(value)].index(key)


def edit_json(value: Any, edits: list[tuple[str, int, str, Any]]) -> Any:
    """A copy of `value` with something in it replaced, left out, renamed or there twice."""
    value = copy.deepcopy(value)
    for kind, place, text, new in edits:
        every = places(value)
        if not every:
            return new
        container, key = every[place % len(every)]
        if kind == "set":
            container[key] = new
        elif kind == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[text] = container.pop(key) if kind == "rename" else container[key]
        else:
            container.append(container[key])
    return value


# ---------------------------------------------------------------- configuration

SMALL: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 300, "block_size": 4, "micro_batch": 2, "tokens_per_step": 16,
    "steps": 8, "encoding": "carope", "lr": 1e-2, "name": "r", "tensorboard": False,
}  # fmt: skip
TOML = st.recursive(
    st.booleans() | NUMBER | TEXT | st.dates() | st.times() | st.datetimes(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3),
    max_leaves=4,
)
KEY = st.sampled_from(list(Config.model_fields)) | TEXT
# Mostly valid, so that what comes after the first check is reached, too
LIKELY: dict[str, Any] = {int: st.integers(1, 16), float: st.floats(0.001, 1), bool: st.booleans(), str: TEXT}
LIKELY_PAIR = st.sampled_from(list(Config.model_fields)).flatmap(
    lambda key: st.tuples(st.just(key), LIKELY.get(type(Config.model_fields[key].default), TEXT))
)
PAIRS = st.lists(LIKELY_PAIR, min_size=1, max_size=3).map(dict)


def toml(value: Any) -> str:
    """A TOML value, by the specification and not by what the repository writes."""
    if isinstance(value, str):
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(k)} = {toml(v)}' for k, v in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else value.isoformat() if hasattr(value, "isoformat") else repr(value)


def document(values: dict[str, Any]) -> bytes:
    return "".join(f"{toml(key)} = {toml(value)}\n" for key, value in values.items()).encode()


def assert_reads_back(cfg: Config, folder: Path) -> None:
    (folder / "again.toml").write_bytes(to_toml(cfg).encode())
    assert load_config([str(folder / "again.toml")]) == cfg


def test_any_value_in_a_config_file(fault, tmp_path):
    happened, tally, file = fault("any TOML values under any keys of a config file"), Tally(), tmp_path / "c.toml"

    @fuzz(600)
    @given(values=PAIRS | st.dictionaries(KEY, TOML, min_size=1, max_size=3))
    @example(values={"name": 'a"b\\c\U0001f600'})
    @example(values={"out_dir": "a\nb"})
    @example(values={"data": "\0"})
    @example(values={"wandb_project": "\x7f"})
    @example(values={"name": 0})
    @example(values={"grad_clip": float("inf")})
    @example(values={"lr": float("inf")})
    @example(values={"lr": float("nan")})
    @example(values={"dist_timeout": 1e300})
    @example(values={"seed": 2**64})
    @example(values={"n_head": 10**12})
    @example(values={"tokens_per_step": 4 * (10**15 + 37), "micro_batch": 7})
    @example(values={"rope_base": 1.0000000000000002})
    @example(values={"a\nb": 1})
    def run(values: dict[str, Any]) -> None:
        file.write_bytes(document(SMALL | values))
        cfg = tally.outcome(lambda: load_config([str(file)]))
        if cfg is not None:
            assert_reads_back(cfg, tmp_path)

    run()
    happened(str(tally), **tally.figures)


@pytest.mark.parametrize(
    "text",
    [
        "steps = " + "[" * 100_000, "a." * 5000 + "a = 1", "steps = 0x" + "f" * 6000, "steps = " + "9" * 5000, "lr = 1e999",
        "steps = 1979-05-27", "[[steps]]", "\ufeffsteps = 1", "steps = 1\r", "name = '''\na'''",
    ],
)  # fmt: skip
def test_what_a_parser_chokes_on(fault, tmp_path, text):
    happened, tally = fault(f"a config file with {text[:24]!r} … ({len(text)} characters)"), Tally()
    (tmp_path / "c.toml").write_text(text)
    tally.outcome(lambda: load_config([str(tmp_path / "c.toml")]))
    happened(str(tally))


def test_any_bytes_in_a_config_file(fault, tmp_path):
    happened, tally, file = (
        fault("bytes of a config file set, flipped, inserted, deleted, doubled, cut off"),
        Tally(),
        tmp_path / "c",
    )

    @fuzz(400)
    @given(edits=BYTE_EDITS)
    def run(edits: list) -> None:
        file.write_bytes(edit_bytes(document(SMALL), edits))
        cfg = tally.outcome(lambda: load_config([str(file)]))
        if cfg is not None:
            assert_reads_back(cfg, tmp_path)

    run()
    happened(str(tally), **tally.figures)


ANY_TEXT = st.text(st.characters(), max_size=10)  # with the surrogates that stand for bytes that are not UTF-8
VALUE = TEXT | ANY_TEXT | NUMBER.map(str) | st.booleans().map(str)


def test_any_words_on_the_command_line(fault, tmp_path):
    happened, tally, file = fault("any words on the command line of train.py"), Tally(), tmp_path / "c.toml"
    file.write_bytes(document(SMALL))
    option = st.builds(lambda key, between, value: f"--{key}{between}{value}", KEY, st.sampled_from(["=", "", " "]), VALUE)
    any_words = st.lists(option | VALUE, min_size=1, max_size=3)

    @fuzz(400)
    @given(words=PAIRS.map(lambda pairs: [f"--{key}={value}" for key, value in pairs.items()]) | any_words)
    @example(words=["--name=a\nb"])
    @example(words=["--name=\ud800"])
    @example(words=["\udcff.toml"])
    @example(words=["a\0.toml"])
    @example(words=["--a\nb"])
    @example(words=["--steps=" + "9" * 5000])
    @example(words=["--micro_batch=1000000000000"])
    @example(words=["x" * 300 + ".toml"])
    @example(words=["."])
    def run(words: list[str]) -> None:
        cfg = None
        with suppress(SystemExit):  # -h, --print_config
            cfg = tally.outcome(lambda: load_config([str(file), *words]))
        if cfg is not None:
            assert_reads_back(cfg, tmp_path)

    run()
    happened(str(tally), **tally.figures)


def test_a_valid_config_reads_back_as_it_was(fault, tmp_path):
    happened, tally = fault("valid configs with every kind of name and number, written and read again"), Tally()
    name = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/"), min_size=1, max_size=20)
    place = name.filter(lambda n: n[0] != "~")  # which becomes the home folder
    positive = st.floats(0, exclude_min=True, allow_infinity=False)

    @fuzz(300)
    @given(
        values=st.fixed_dictionaries(
            {},
            optional={
                "name": name.filter(lambda n: n not in (".", "..")), "out_dir": place, "data": place, "wandb_project": name,
                "encoding": st.sampled_from(sorted(ENCODINGS.keys() - {"rope"})), "seed": st.integers(0, 2**63 - 1),
                "steps": st.integers(1, 2**40), "lr": positive, "grad_clip": st.floats(0, exclude_min=True),
                "tensorboard": st.booleans(), "rope_base": st.floats(1.001, 1e15), "spike_threshold": positive,
            },
        )
    )  # fmt: skip
    @example(values={"name": "\"'\\#=[]{} \u2028\U0001f600"})
    @example(values={"grad_clip": float("inf")})
    @example(values={"lr": 5e-324})
    def run(values: dict[str, Any]) -> None:
        cfg = Config(**SMALL | {"min_lr": 0.0, "block_size": 8} | values)  # shorter, and some encodings refuse
        kept = {key: value for key, value in values.items() if key in Config.model_fields or key in cfg.own_options}
        assert values.keys() - kept <= {"rope_base"} and all(getattr(cfg, key) == value for key, value in kept.items())
        assert_reads_back(cfg, tmp_path)
        tally.counts["taken"] += 1

    run()
    happened(f"{tally.counts['taken']} configs read back equal", examples=tally.counts["taken"])


# ---------------------------------------------------------------- data

TOKENS = np.arange(60, dtype=np.uint16)


def read_through(folder: Path) -> TokenStream:
    """All that a run reads of its data."""
    stream = TokenStream(folder, "train", 300)
    stream.verify()
    assert stream.read(3, 2 * len(stream)).max() < 300
    return stream


def test_any_bytes_in_a_shard(fault, tmp_path):
    happened, tally, path = fault("any header, size and bytes of a .bin shard"), Tally(), tmp_path / "train_000001.bin"
    number = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 60, MAGIC, VERSION, 2**30, -1])
    header = st.tuples(st.just(MAGIC) | number, st.just(VERSION) | number, number)
    body = st.just(TOKENS.tobytes()) | st.binary(max_size=140)
    shard = st.tuples(header, body) | body.map(lambda tokens: ((MAGIC, VERSION, len(tokens) // 2), tokens))

    @fuzz(300)
    @given(shard=shard, edits=st.just([]) | BYTE_EDITS)
    def run(shard: tuple[tuple[int, int, int], bytes], edits: list) -> None:
        header, body = shard
        path.write_bytes(edit_bytes(struct.pack(f"<{HEADER_INTS}i", *header, *[0] * (HEADER_INTS - 3)) + body, edits))
        tokens = tally.outcome(lambda: open_shard(path))
        if tokens is not None:
            assert tokens.dtype == np.uint16 and tokens.tobytes() == path.read_bytes()[4 * HEADER_INTS :] != b""
            tally.outcome(lambda: read_through(tmp_path))

    run()
    happened(str(tally), **tally.figures)


def npy(version: tuple[int, int], header: bytes, body: bytes) -> bytes:
    """An .npy file, whatever its header says."""
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + body


def test_any_bytes_in_an_npy_shard(fault, tmp_path):
    happened, tally, path = fault("any header, size and bytes of an .npy shard"), Tally(), tmp_path / "train_000001.npy"
    descr = st.sampled_from(["<u2", ">u2", "|u1", "<i2", "|O", "<f8", "<M8[ns]", "|V3", "<U3", [("a", "<u2")], ""]) | JSON
    shape = (
        st.sampled_from(
            [(60,), (0,), (-60,), (6, 10), (), (10**30,), (2**63 + 60,), (2**62, 4), (True,), (59,), (61,), 60, [60]]
        )
        | JSON
    )
    head = st.fixed_dictionaries({"descr": st.just("<u2") | descr, "fortran_order": st.booleans() | JSON, "shape": shape})
    text = st.builds(lambda head, edits: edit_json(head, edits), head, st.just([]) | JSON_EDITS).map(repr)
    valid = {"descr": "<u2", "fortran_order": False, "shape": (60,)}

    @fuzz(400)
    @given(
        version=st.just((1, 0)) | st.sampled_from([(2, 0), (3, 0), (0, 0), (9, 9)]),
        header=text | st.just(repr(valid)),
        body=st.just(TOKENS.tobytes()) | st.binary(max_size=140),
        edits=st.just([]) | BYTE_EDITS,
    )
    @example(version=(1, 0), header=repr(valid), body=TOKENS.tobytes() + b"\0\0", edits=[])
    @example(version=(1, 0), header="(" * 3000, body=b"", edits=[])
    @example(version=(3, 0), header="{" * 200, body=b"", edits=[])
    @example(version=(1, 0), header=repr(valid | {"shape": (10**30,)}), body=b"", edits=[])
    @example(version=(1, 0), header=repr(valid | {"descr": "\n"}), body=b"", edits=[])
    def run(version: tuple[int, int], header: str, body: bytes, edits: list) -> None:
        path.write_bytes(edit_bytes(npy(version, header.encode("utf-8", "replace") + b"\n", body), edits))
        tokens = tally.outcome(lambda: open_shard(path))
        if tokens is not None:
            assert (
                tokens.dtype == np.uint16 and tokens.ndim == 1 and path.read_bytes().endswith(tokens.tobytes()) and len(tokens)
            )
            tally.outcome(lambda: read_through(tmp_path))

    run()
    happened(str(tally), **tally.figures)


def test_an_archive_or_another_shard_under_the_name_of_a_shard(fault, tmp_path):
    happened, tally = (
        fault("an .npz archive, a .bin as .npy, an .npy as .bin, a folder, a file without a shard's bytes"),
        Tally(),
    )
    np.savez(tmp_path / "a.npz", TOKENS)
    np.save(tmp_path / "b.npy", TOKENS)
    write_shard(tmp_path / "c.bin", TOKENS)
    (tmp_path / "folder").mkdir()
    for source, name in (
        ("a.npz", "train_a.npy"),
        ("b.npy", "train_b.bin"),
        ("c.bin", "train_c.npy"),
        ("a.npz", "train_d.bin"),
    ):
        shutil.copy(tmp_path / source, tmp_path / name)
        assert tally.outcome(lambda path=tmp_path / name: open_shard(path)) is None
    for name in ("train_e.bin", "train_f.npy"):
        (tmp_path / name).mkdir()
        assert tally.outcome(lambda path=tmp_path / name: open_shard(path)) is None
    happened(str(tally), **tally.figures)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of two shards with a manifest."""
    folder, shards = tmp_path / "data", []
    folder.mkdir()
    for split, name, tokens in (("val", "val_000000.bin", TOKENS[:20]), ("train", "train_000001.bin", TOKENS)):
        sha256 = write_shard(folder / name, tokens)
        shards.append({"file": name, "split": split, "tokens": len(tokens), "documents": 1, "sha256": sha256})
    manifest = {"source": ["x"], "tokenizer": "bytes", "n_vocab": 257, "files": [["x", 3]], "revision": None, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_any_manifest(fault, folder):
    happened, tally = fault("any values in manifest.json, and any bytes"), Tally()
    valid = json.loads((folder / MANIFEST).read_text())

    @fuzz(400)
    @given(edits=JSON_EDITS, bytewise=st.just([]) | BYTE_EDITS)
    @example(edits=[("set", place_of(valid, "file"), "", "../data/val_000000.bin")], bytewise=[])
    @example(edits=[("set", place_of(valid, "file"), "", "a\nb")], bytewise=[])
    def run(edits: list, bytewise: list) -> None:
        (folder / MANIFEST).write_bytes(edit_bytes(json.dumps(edit_json(valid, edits)).encode(), bytewise))
        stream = tally.outcome(lambda: read_through(folder))
        if stream is not None:
            assert stream.read(0, 60).tolist() == TOKENS.tolist()
            ShardRecord.model_validate_json(stream.records()[0].model_dump_json())
        tally.outcome(lambda: read_earlier(folder))

    run()
    happened(str(tally), **tally.figures)


def test_any_progress_file(fault, folder):
    happened, tally = fault("any values in the .progress.json of a preparation, and any bytes"), Tally()
    valid = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    for shard in valid["shards"]:
        shard["end"] = {"file": 0, "item": 3, "offset": 2, "null": 0, "empty": 0}

    @fuzz(400)
    @given(edits=JSON_EDITS, bytewise=st.just([]) | BYTE_EDITS)
    @example(edits=[("set", place_of(valid, "file"), "", "../data/val_000000.bin")], bytewise=[])
    @example(edits=[("set", place_of(valid, "files"), "", 5)], bytewise=[])
    @example(edits=[("set", place_of(valid, "item"), "", -1)], bytewise=[])
    def run(edits: list, bytewise: list) -> None:
        (folder / PROGRESS).write_bytes(edit_bytes(json.dumps(edit_json(valid, edits)).encode(), bytewise))
        found = tally.outcome(lambda: read_earlier(folder))
        if found is not None:
            earlier, finished = found
            assert not finished and all(
                folder / shard["file"] in folder.iterdir() for shard in intact(folder, earlier["shards"])
            )

    run()
    happened(str(tally), **tally.figures)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '"\\ud800"', "", "\0", '{"shards": [[]]}'])
def test_what_a_json_parser_chokes_on(fault, folder, text):
    happened, tally = fault(f"manifest.json and .progress.json are {text[:20]!r} ({len(text)} characters)"), Tally()
    for name in (MANIFEST, PROGRESS):
        (folder / name).write_text(text)
        assert tally.outcome(lambda: read_earlier(folder)) is None
        (folder / name).unlink()
    happened(str(tally), **tally.figures)


def test_any_lock_file(fault, tmp_path):
    happened, tally = fault("any content of the .lock of a process that is at work"), Tally()
    owner = {"pid": 1, "host": "h", "command": "train.py", "since": "now"}

    @fuzz(100)
    @given(edits=st.just([]) | JSON_EDITS, bytewise=st.just([]) | BYTE_EDITS)
    @example(edits=[("set", 2, "", "a\nb\x1b[2J")], bytewise=[])
    def run(edits: list, bytewise: list) -> None:
        with locked(tmp_path / "r"):
            (tmp_path / "r/.lock").write_bytes(edit_bytes(json.dumps(edit_json(owner, edits)).encode(), bytewise))

            def enter() -> None:
                with locked(tmp_path / "r"):
                    raise AssertionError("two owners")

            tally.outcome(enter)

    run()
    assert tally.counts["taken"] == 0
    happened(str(tally), **tally.figures)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with one tiny checkpoint."""
    run = tmp_path_factory.mktemp("fuzz") / "r"
    cfg = Config(**SMALL)
    model = GPT(cfg)
    optimizer = make_optimizer(model, cfg)
    idx = torch.arange(8).view(2, 4)
    model(idx, idx).backward()
    optimizer.step()
    shard = ShardRecord(file="train_000001.bin", tokens=60, sha256="0" * 64, mtime_ns=1)
    state = State(
        step=4, tokens=64, config=cfg.model_dump(), tokenizer="bytes", train_tokens=60, shards=[shard], val_loss=1.5,
        val_step=4, log_bytes=100, guard={"loss": [1.0]}, git=None,
    )  # fmt: skip
    write_checkpoint(run, {MODEL: dict(model.state_dict()), OPTIMIZER: optimizer_tensors(model, optimizer)}, state)
    return run


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(saved / "checkpoints/step_000004", tmp_path / "r/checkpoints/step_000004"))


def plant(checkpoint: Path, name: str, data: bytes) -> None:
    """Write a file of the checkpoint, and its sha256 into state.json, so that only the parser stands before the code."""
    (checkpoint / name).write_bytes(data)
    state = json.loads((checkpoint / STATE).read_text())
    state["sha256"][name] = hashlib.sha256(data).hexdigest()
    (checkpoint / STATE).write_text(sealed(state))


def test_any_state(fault, copied):
    happened, tally = fault("any values in a checkpoint's state.json, and any bytes"), Tally()
    valid = json.loads((copied / STATE).read_text())
    weights = load_model(copied)[0].state_dict()

    @fuzz(500)
    @given(edits=JSON_EDITS, bytewise=st.just([]) | BYTE_EDITS)
    @example(edits=[("delete", place_of(valid, "sha256"), "", None)], bytewise=[])
    @example(edits=[("set", place_of(valid, "step"), "", 10**30)], bytewise=[])
    @example(edits=[("set", place_of(valid, "step"), "", 3)], bytewise=[])
    @example(edits=[("rename", place_of(valid, "steps"), "a\nb", None)], bytewise=[])
    @example(edits=[("set", place_of(valid, "guard"), "", {"a\nb": 3})], bytewise=[])
    @example(edits=[("set", place_of(valid, "file"), "", "../x")], bytewise=[])
    def run(edits: list, bytewise: list) -> None:
        value = edit_json(valid, edits)
        can_be_sealed = isinstance(value, dict) and isinstance(value.get("sha256", {}), dict)
        text = sealed(value) if can_be_sealed else json.dumps(value)
        (copied / STATE).write_bytes(edit_bytes(text.encode(), bytewise))
        found = tally.outcome(lambda: load_model(copied))
        if found is not None:
            model, state, _ = found
            same = [json.dumps(json.loads(t), sort_keys=True) for t in ((copied / STATE).read_text(), text)]
            assert same[0] == same[1], "a changed value was not noticed"
            assert state.step == 4 and not any(p.is_meta for p in model.parameters())
            assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())

    run()
    happened(str(tally), **tally.figures)


@pytest.mark.parametrize(
    "text", ["[]", "3", "[" * 100_000, '"\\ud800"', "", "\0", '{"step": 4}', '{"step": ' + "9" * 5000 + "}"]
)
def test_a_run_whose_older_checkpoint_has_another_state(fault, copied, text):
    from core.checkpoint import find_checkpoint, prune_checkpoints

    happened, tally = (
        fault(f"state.json of one of two checkpoints is {text[:20]!r}; both are weighed when old ones are deleted"),
        Tally(),
    )
    shutil.copytree(copied, damaged := copied.with_name("step_000003"))
    (damaged / STATE).write_text(text)
    prune_checkpoints(copied.parents[1], 2)
    assert damaged.exists() and tally.outcome(lambda: find_checkpoint(damaged)) is None
    assert find_checkpoint(copied.parents[1])[0] == copied
    prune_checkpoints(copied.parents[1], 1)
    assert damaged.exists()
    happened(f"{tally}; the whole one is found, the damaged one stays: nothing is deleted that was not read")


DTYPES = [
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
    "C64", "F4", "F6_E2M3", "f32", "f",
]  # fmt: skip
TENSOR_EDIT = st.tuples(
    st.sampled_from(["dtype", "shape", "offsets", "rename", "delete", "add", "metadata"]),
    st.integers(0, 2**16),
    st.sampled_from(["a\nb", "rng.x", "rng.cpu", "__metadata__", ""]) | TEXT,
    st.sampled_from(DTYPES)
    | st.lists(st.integers(0, 2**64), max_size=4)
    | st.lists(st.integers(0, 4000), min_size=2, max_size=2)
    | JSON,
)
HEADER_LENGTH = st.just(None) | st.integers(0, 2**64 - 1) | st.integers(0, 2000)


def edit_header(header: dict[str, Any], edits: list[tuple[str, int, str, Any]]) -> dict[str, Any]:
    """A safetensors header with tensors of another type, shape, place or name, some missing, some added."""
    header = copy.deepcopy(header)
    for kind, place, text, value in edits:
        names = [name for name in header if isinstance(header[name], dict)] or [""]
        name = names[place % len(names)]
        if kind in ("dtype", "shape", "offsets"):
            header.setdefault(name, {})["data_offsets" if kind == "offsets" else kind] = value
        elif kind == "metadata":
            header["__metadata__"] = value
        elif kind == "add":
            header[text] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} if place % 2 else value
        elif name in header:
            tensor = header.pop(name)
            if kind == "rename":
                header[text] = tensor
    return header


def pack(header: bytes, body: bytes, length: int | None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


FILE_EDITS = {
    "edits": st.lists(TENSOR_EDIT, max_size=2) | st.just([]),
    "length": st.just(None) | HEADER_LENGTH,
    "bytewise": st.just([]) | BYTE_EDITS,
}


def test_any_weights(fault, copied):
    happened, tally = fault("any header and bytes of model.safetensors, its sha256 put right"), Tally()
    header, body = unpack((copied / MODEL).read_bytes())

    @fuzz(400)
    @given(**FILE_EDITS)
    @example(edits=[("rename", 0, "a\nb", None)], length=None, bytewise=[])
    @example(edits=[("dtype", 0, "", "I32")], length=None, bytewise=[])
    @example(edits=[("add", 1, "rng.x", None)], length=None, bytewise=[])
    @example(edits=[], length=2**64 - 1, bytewise=[])
    def run(edits: list, length: int | None, bytewise: list) -> None:
        text = json.dumps(edit_header(header, edits)).encode()
        plant(copied, MODEL, edit_bytes(pack(text, body, length), bytewise))
        found = tally.outcome(lambda: load_model(copied))
        if found is not None:
            model, state, _ = found
            assert state.step == 4 and {p.dtype for p in model.parameters()} == {torch.float32}

    run()
    happened(str(tally), **tally.figures)


def test_any_optimizer_state(fault, copied):
    happened, tally = fault("any header and bytes of optimizer.safetensors, its sha256 put right"), Tally()
    header, body = unpack((copied / OPTIMIZER).read_bytes())
    cfg = Config(**SMALL)
    model = GPT(cfg)

    @fuzz(500)
    @given(**FILE_EDITS)
    @example(edits=[("delete", 0, "", None)], length=None, bytewise=[])
    @example(edits=[("rename", len(header) - 1, "rng.x", None)], length=None, bytewise=[])
    @example(edits=[("add", 0, "rng.cpu", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})], length=None, bytewise=[])
    def run(edits: list, length: int | None, bytewise: list) -> None:
        text = json.dumps(edit_header(header, edits)).encode()
        plant(copied, OPTIMIZER, edit_bytes(pack(text, body, length), bytewise))
        optimizer = make_optimizer(model, cfg)
        with torch.random.fork_rng(devices=[]):
            found = tally.outcome(lambda: load_optimizer(copied, model, optimizer) or True)
            if found is not None:
                torch.rand(700)  # the generator's state is one that works
                state = optimizer.state_dict()["state"]
                assert len(state) == len(list(model.parameters()))
                assert all(torch.is_tensor(v) and v.dtype == torch.float32 for one in state.values() for v in one.values())

    run()
    happened(str(tally), **tally.figures)


def test_a_bit_flipped_anywhere_in_a_checkpoint_is_refused(fault, copied):
    happened, tally = fault("a bit flipped in model.safetensors or optimizer.safetensors"), Tally()
    from core.checkpoint import find_checkpoint

    whole = {name: (copied / name).read_bytes() for name in (MODEL, OPTIMIZER)}

    @fuzz(200)
    @given(name=st.sampled_from([MODEL, OPTIMIZER]), place=st.integers(0, 2**16), bit=st.integers(0, 7))
    def run(name: str, place: int, bit: int) -> None:
        (copied / name).write_bytes(edit_bytes(whole[name], [("flip", place, bit)]))
        assert sha256_file(copied / name) != hashlib.sha256(whole[name]).hexdigest()
        assert tally.outcome(lambda: find_checkpoint(copied)) is None
        (copied / name).write_bytes(whole[name])

    run()
    assert find_checkpoint(copied)[1].step == 4
    happened(str(tally), **tally.figures)
