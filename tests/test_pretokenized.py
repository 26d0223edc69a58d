"""prepare_fineweb.py --pretokenized: shards that others wrote, from a hub on loopback and from folders."""

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until
from hub import COMMIT, Fault, contents, run, serving_files, start

import prepare_fineweb
from core.config import load_config
from core.data import TokenStream
from core.documents import end_of_text
from core.errors import UserError
from text import pretokenized
from text.shards import open_shard
from train import train

OWNER = "kjj0/finewebedu10B-gpt2"
TOKENS = {name: np.random.default_rng(i).integers(0, 50257, n) for i, (name, n) in enumerate({
    "finewebedu_val_000000.bin": 30_000, "finewebedu_train_000001.bin": 50_000, "finewebedu_train_000002.bin": 50_000,
    "finewebedu_train_000003.bin": 20_000,
}.items())}  # fmt: skip
NAMES = ["val_000000.bin", "train_000001.bin", "train_000002.bin", "train_000003.bin"]
VAL, FIRST, SECOND, THIRD = TOKENS
CUT = 60_000  # bytes


def shard(tokens, magic=20240520, n=None):
    """The bytes of a shard as llm.c lays them out."""
    header = struct.pack("<256i", magic, 1, len(tokens) if n is None else n, *[0] * 253)
    return header + np.asarray(tokens).astype("<u2").tobytes()


FILES = {name: shard(TOKENS[name]) for name in (THIRD, VAL, SECOND, FIRST)} | {"README.md": b"no shard", ".gitattributes": b""}
EXPECTED = {name: hashlib.sha256(FILES[theirs]).hexdigest() for name, theirs in zip(NAMES, TOKENS, strict=True)}


@pytest.fixture
def hub(tmp_path):
    with serving_files(dict(FILES), tmp_path / "data", OWNER) as server:
        yield server


@pytest.fixture
def prepare(hub, tmp_path):
    """The command, as run(…) or start(…)."""

    def go(*words, how=run, **env):
        words = words or ("--pretokenized", OWNER)
        env = {**hub.env, "HF_HOME": str(tmp_path / "home"), **env}
        return how(*words, "--out", tmp_path / "data", env=env, constants={"FIRST_WAIT": 0.05})

    return go


def assert_whole(out: Path, names=NAMES) -> dict:
    """The shards byte for byte, the manifest that fits them, and nothing else; returns the manifest."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert contents(out) == {name: EXPECTED[name] for name in names} | {"manifest.json": contents(out)["manifest.json"]}
    theirs = dict(zip(NAMES, TOKENS, strict=True))
    assert manifest["shards"] == [
        {
            "file": name,
            "split": name.split("_")[0],
            "tokens": len(TOKENS[theirs[name]]),
            "documents": int((TOKENS[theirs[name]] == 50256).sum()),
            "sha256": EXPECTED[name],
        }
        for name in names
    ]
    assert (manifest["tokenizer"], manifest["n_vocab"], manifest["eot"]) == ("gpt2", 50257, 50256)
    assert manifest["tokens"] == sum(s["tokens"] for s in manifest["shards"])
    return manifest


def error_of(*words: object) -> str:
    """The one line that the command, run in this process, ends with."""
    with pytest.raises(UserError) as caught:
        prepare_fineweb.prepare(prepare_fineweb.parse_args([str(word) for word in words]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def npy(tokens) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(tokens, dtype=np.uint16))
    return file.getvalue()


# ---------------------------------------------------------------- the hub


def test_a_dataset_of_shards_becomes_a_data_folder(hub, prepare, tmp_path):
    rc, out, err = prepare(HF_TOKEN="hf_secret")
    assert rc == 0, err
    assert "finished, 150,000 tokens" in out and "from finewebedu_train_000003.bin" in out
    assert assert_whole(tmp_path / "data")["revision"] == COMMIT
    assert sorted(hub.downloads) == sorted(TOKENS) and hub.downloads[0] == VAL
    assert "Bearer hf_secret" in hub.tokens
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix == ".bin"], "the data is on the disk once"
    stream = TokenStream(tmp_path / "data", "train", 50304)
    stream.verify()
    assert stream.read(49_000, 2000).tolist() == [*TOKENS[FIRST][49_000:], *TOKENS[SECOND][:1000]]

    hub.shutdown()  # finished: nobody is asked
    assert "finished already, every sha256 is right" in prepare()[1]


def test_a_damaged_or_missing_shard_is_fetched_again(hub, prepare, tmp_path):
    assert prepare()[0] == 0
    with open(tmp_path / "data" / NAMES[2], "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    (tmp_path / "data" / NAMES[3]).unlink()
    hub.downloads.clear()
    hub.head = COMMIT[::-1]  # the dataset was changed meanwhile
    rc, _, err = prepare()
    assert rc == 0, err
    assert sorted(hub.downloads) == [SECOND, THIRD]
    assert assert_whole(tmp_path / "data")["revision"] == COMMIT


def test_limit_tokens_takes_whole_shards(hub, prepare, tmp_path):
    rc, _, err = prepare("--pretokenized", f"hf://datasets/{OWNER}@main", "--limit_tokens", "80_001")
    assert rc == 0, err
    assert sorted(hub.downloads) == sorted([VAL, FIRST, SECOND])
    assert_whole(tmp_path / "data", NAMES[:3])
    rc, _, err = prepare("--pretokenized", OWNER)
    assert rc == 2 and "holds work of other arguments" in err


def test_faults_of_the_hub_are_waited_out(hub, prepare, tmp_path):
    hub.faults = {
        VAL: [Fault(status=503)],
        FIRST: [Fault(cut=CUT)],
        SECOND: [Fault(corrupt=True)],
        THIRD: [Fault(cut=99, reset=True)],
    }
    rc, _, err = prepare()
    assert rc == 0, err
    assert [len(hub.asked(name)) for name in (FIRST, SECOND, THIRD)] == [2, 2, 2]
    assert_whole(tmp_path / "data")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_interrupted_it_goes_on(hub, prepare, tmp_path, number):
    hub.faults = {SECOND: [Fault(cut=CUT, slow=True)]}
    out = tmp_path / "data"
    process = prepare(how=start)
    wait_until(process, lambda: hub.asked(SECOND) and all((out / NAMES[i]).exists() for i in (0, 1, 3)))
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 143 and "3 shards are finished" in err.splitlines()[-1] and "Traceback" not in err
        assert not (out / ".download").exists()
    assert not (out / "manifest.json").exists() and not (out / NAMES[2]).exists()
    hub.downloads.clear()
    rc, _, err = prepare()
    assert rc == 0, err
    assert hub.downloads == [SECOND]
    assert_whole(out)


def fill_cache(env: dict[str, str], *names: str) -> None:
    """As the client's own command would."""
    code = f"from huggingface_hub import hf_hub_download as get; [get({OWNER!r}, n, repo_type='dataset') for n in {names!r}]"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


def test_what_the_cache_holds_is_linked_and_a_damaged_copy_is_not(hub, prepare, tmp_path):
    env = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home")}
    fill_cache(env, VAL, FIRST, SECOND)
    cached = {path.name: path for path in (tmp_path / "home").rglob("*.bin")}
    blob = cached[SECOND].resolve()
    blob.write_bytes(shard(TOKENS[SECOND][::-1]))
    hub.downloads.clear()
    rc, _, err = prepare()
    assert rc == 0, err
    assert sorted(hub.downloads) == [SECOND, THIRD]
    assert (tmp_path / "data" / NAMES[1]).samefile(cached[FIRST])
    assert_whole(tmp_path / "data")


def test_offline_takes_the_cache(hub, prepare, tmp_path):
    env = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home")}
    fill_cache(env, *TOKENS)
    rc, _, err = prepare(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert rc == 0, err
    assert_whole(tmp_path / "data")


WRONG = {
    "wrong magic": ({VAL: shard(TOKENS[VAL], magic=20240801)}, f"{VAL}: not a token shard (magic 20240801, expected 20240520)"),
    "wrong count": ({VAL: shard(TOKENS[VAL], n=7)}, f"{VAL}: 61024 bytes, but its header promises 7 tokens"),
    "half a header": ({VAL: b"x" * 500}, f"{VAL}: 500 bytes, shorter than a shard's 1024-byte header"),
    "another tokenizer": ({VAL: shard([5, 50257, 6])}, f"{VAL}: token 1 is 50257, GPT-2's tokenizer has 50,257 ids"),
    "no shards": (None, "no .bin or .npy files there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_dataset_of_shards_is_one_line_and_leaves_nothing(hub, prepare, tmp_path, case):
    files, expected = WRONG[case]
    hub.files = {"README.md": b""} if files is None else hub.files | files
    rc, _, err = prepare()
    assert (rc, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ") and expected in err
    assert hub.downloads == ([] if files is None else [VAL])
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- folders, names, arguments


def test_a_folder_of_npy_shards_is_linked_and_trains(tmp_path):
    rows = {
        f"edufineweb_{split}_{i:06d}.npy": npy(np.arange(i, i + 3000) % 256)
        for i, split in enumerate(["val", "train", "train"])
    }
    theirs, out = folder_of(tmp_path / "theirs", rows), tmp_path / "out"
    prepare_fineweb.prepare(prepare_fineweb.parse_args(["--pretokenized", str(theirs), "--out", str(out)]))
    assert {path.name for path in out.iterdir()} == {"val_000000.npy", "train_000001.npy", "train_000002.npy", "manifest.json"}
    assert (out / "train_000001.npy").samefile(theirs / "edufineweb_train_000001.npy")
    words = [
        f"--data={out}",
        f"--out_dir={tmp_path}",
        "--name=r",
        "--device=cpu",
        "--dtype=float32",
        "--n_layer=1",
        "--n_head=2",
    ]
    size = ["--n_embd=8", "--block_size=16", "--micro_batch=2", "--tokens_per_step=64", "--steps=2", "--warmup_steps=0"]
    assert train(load_config([*words, *size, "--eval_tokens=64", "--final_eval_tokens=64", "--verify_data=full"])) == 0


def bytes_folder(tmp_path: Path) -> Path:
    """A data folder of ours, by the tokenizer "bytes"."""
    (tmp_path / "a.txt").write_text("Some words to begin with. " * 400)
    words = ["--source", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "ours", "--shard_tokens", 3000]
    prepare_fineweb.prepare(prepare_fineweb.parse_args([*map(str, words), "--val_tokens", "1000"]))
    return tmp_path / "ours"


def test_a_manifest_is_believed_in_a_folder(tmp_path):
    ours, out = bytes_folder(tmp_path), tmp_path / "out"
    pretokenized.adopt(str(ours), out, None, 2)
    mine, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (out, ours))
    assert [mine[key] for key in ("tokenizer", "n_vocab", "eot", "tokens", "documents")] == ["bytes", 257, 256, 10401, 1]
    assert [(s["split"], s["sha256"]) for s in mine["shards"]] == [(s["split"], s["sha256"]) for s in theirs["shards"]]
    stream = TokenStream(out, "train", 257)
    assert stream.tokenizer == "bytes" and end_of_text(stream) == 256
    (out / "train_000002.bin").unlink()
    pretokenized.adopt(str(ours), out, None, 2)  # and again what is missing
    assert mine == json.loads((out / "manifest.json").read_text())


def test_a_manifest_is_believed_on_the_hub(tmp_path):
    ours = bytes_folder(tmp_path)
    files = {path.name: path.read_bytes() for path in ours.iterdir()}
    with serving_files(files, tmp_path / "data", OWNER) as server:
        env = {**server.env, "HF_HOME": str(tmp_path / "home")}
        rc, _, err = run("--pretokenized", OWNER, "--out", tmp_path / "data", env=env, constants={"FIRST_WAIT": 0.05})
    assert rc == 0, err
    made = contents(tmp_path / "data")
    assert made.keys() == files.keys() and all(made[name] == contents(ours)[name] for name in files if name.endswith(".bin"))
    assert json.loads((tmp_path / "data/manifest.json").read_text())["tokenizer"] == "bytes"


def changed(manifest: Path, **values: object) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))


@pytest.mark.parametrize("case", ["damaged", "other shards", "no manifest of ours", "too few ids", "changed shard"])
def test_a_manifest_that_cannot_be_believed_is_refused(tmp_path, case):
    ours, out = bytes_folder(tmp_path), ["--out", tmp_path / "out"]
    manifest = ours / "manifest.json"
    if case == "damaged":
        manifest.write_text(manifest.read_text()[:100])
        expected = "unreadable manifest"
    elif case == "other shards":
        (ours / "train_000001.bin").rename(ours / "train_000009.bin")
        expected = "train_000001.bin is either not there or not in its manifest.json"
    elif case == "no manifest of ours":
        manifest.write_text('{"name": "an app"}')
        expected = "unreadable manifest (tokenizer: Field required)"
    elif case == "too few ids":
        changed(manifest, tokenizer="tiny", n_vocab=100)
        expected = "its tokenizer 'tiny' has 100 ids; it is a shard of another tokenizer, or damaged"
    else:
        data = bytearray((ours / "val_000000.bin").read_bytes())
        data[-2] ^= 1
        (ours / "val_000000.bin").write_bytes(data)
        expected = "val_000000.bin: is not the shard that its manifest.json lists (another sha256)"
    assert expected in error_of("--pretokenized", ours, *out)
    assert not (tmp_path / "out").exists()


def test_nanogpts_files_without_a_header_become_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenized, "PIECE_TOKENS", 20_000)
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, 50257, n).astype("<u2") for name, n in {"train.bin": 50_000, "val.bin": 7000}.items()}
    theirs = folder_of(tmp_path / "theirs", {name: tokens.tobytes() for name, tokens in ids.items()})
    with pytest.raises(UserError, match=r"without a header, as nanoGPT writes them; .* --pretokenized .*/theirs --out FOLDER"):
        TokenStream(theirs, "train", 50304)
    out = tmp_path / "out"
    prepare_fineweb.prepare(prepare_fineweb.parse_args(["--pretokenized", str(theirs), "--out", str(out)]))
    names = ["manifest.json", "train_000001.bin", "train_000002.bin", "train_000003.bin", "val_000000.bin"]
    assert sorted(path.name for path in out.iterdir()) == names
    for split in ("train", "val"):
        stream = TokenStream(out, split, 50304)
        stream.verify()
        assert np.array_equal(stream.read(0, len(stream)), ids[f"{split}.bin"])
    assert contents(theirs) == {name: hashlib.sha256(tokens.tobytes()).hexdigest() for name, tokens in ids.items()}
    (out / "train_000002.bin").unlink()
    pretokenized.adopt(str(theirs), out, None, 2)
    assert (out / "train_000002.bin").exists()

    (theirs / "meta.pkl").write_bytes(b"anything")
    assert "of a vocabulary of their own" in error_of("--pretokenized", theirs, "--out", tmp_path / "other")


def test_another_file_system_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    theirs, out = folder_of(tmp_path / "theirs", FILES), tmp_path / "data"
    pretokenized.adopt(str(theirs), out, None, 2)
    assert_whole(out)
    assert not (out / NAMES[0]).samefile(theirs / VAL)


@pytest.mark.parametrize(
    ("in_order", "n_val"),
    [
        (["a_1.bin", "a_2.bin", "a_10.bin"], 1),  # none says val; numbers count as numbers
        (["VAL.bin", "train_0.bin", "train_1.bin"], 1),
        (["val_0.bin", "val_1.bin", "t_3.bin"], 2),
    ],
)
def test_names(in_order, n_val):
    theirs = [in_order[i] for i in (2, 0, 1)]
    files = [pretokenized.SourceFile(f"values/{name}", 2048, 0) for name in theirs]
    ours = [f"val_{i:06d}.bin" for i in range(n_val)] + [f"train_{i:06d}.bin" for i in range(n_val, 3)]
    planned = pretokenized.plan("x", files, None)
    assert [theirs[p.file] for p in planned] == in_order and [p.name for p in planned] == ours
    assert [p.name for p in pretokenized.plan("x", files, 1)] == ours[: n_val + 1], "one to train on, whatever the limit"
    with pytest.raises(UserError, match="several folders, name one: other, values"):
        pretokenized.plan("x", [*files, pretokenized.SourceFile("other/train_0.bin", 2048, 0)], None)


def test_refused(tmp_path, monkeypatch):
    theirs = folder_of(tmp_path / "theirs", {VAL: FILES[VAL]})
    out = ["--out", tmp_path / "out"]
    assert "no shard to train on" in error_of("--pretokenized", theirs, *out)
    assert "no .bin or .npy files there" in error_of("--pretokenized", folder_of(tmp_path / "none", {}), *out)
    assert "no folder here, nor OWNER/NAME" in error_of("--pretokenized", tmp_path / "nowhere", *out)
    assert "say with --out" in error_of("--pretokenized", "someone/shards")
    assert str(prepare_fineweb.parse_args(["--pretokenized", OWNER]).out) == load_config([]).data, "what train.py reads"
    for words in (["--source", "demo"], ["--tokenizer", "bytes"], ["--shard_tokens", "5"], ["--val_tokens", "5"]):
        assert f"{words[0]} does not go with --pretokenized" in error_of("--pretokenized", theirs, *out, *words)
    shutil.copy(theirs / VAL, theirs / FIRST)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 9))
    monkeypatch.setattr(pretokenized, "linkable", lambda *_: False)
    assert "too little space, 0.1 MB are needed and 0.0 MB free" in error_of("--pretokenized", theirs, *out)
    assert not (tmp_path / "out").exists()


def test_text_and_shards_are_not_mixed(tmp_path):
    theirs, out = folder_of(tmp_path / "theirs", FILES), tmp_path / "out"
    pretokenized.adopt(str(theirs), out, None, 2)
    assert "holds work of other arguments" in error_of("--source", "demo", "--out", out)
    assert open_shard(out / NAMES[0]).tolist() == TOKENS[VAL].tolist()
