"""What a stranger gives us, a checkpoint, a run folder, shards, a config, runs no code and leads nowhere outside its folder."""

import hashlib
import io
import json
import pickle
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file, save_file

import eval_ppl
import sample
from core.checkpoint import MODEL, OPTIMIZER, STATE, load_model, sealed
from core.config import load_config
from core.data import TokenStream
from core.distributed import Distributed
from core.errors import UserError
from core.files import LOCK
from eval_ppl import evaluate_run
from prepare_fineweb import Job, prepare
from text.shard_writer import write_shard
from text.shards import HEADER_BYTES, MANIFEST
from text.sources import open_source
from text.token_stream import PROGRESS
from train import train

CPU = Distributed(torch.device("cpu"), torch.float32)
NEWEST = "r/checkpoints/step_000004"


class Malice:
    """Unpickled, it opens a file for writing: the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.canary), "w")


def pickled(malice: Malice) -> bytes:
    return pickle.dumps(malice)


def torch_saved(malice: Malice) -> bytes:
    torch.save({"model": malice}, file := io.BytesIO())
    return file.getvalue()


def numpy_saved(malice: Malice) -> bytes:
    np.save(file := io.BytesIO(), np.array([malice], dtype=object), allow_pickle=True)
    return file.getvalue()


FORMS = {"pickle": pickled, "torch.save": torch_saved, "numpy.save": numpy_saved}


@pytest.fixture(scope="module")
def begun(corpus, tmp_path_factory) -> Path:
    """A folder with `data` and a run `r` with checkpoints at steps 2 and 4."""
    home = tmp_path_factory.mktemp("begun")
    shutil.copytree(corpus, home / "data")
    train(load_config(words_of(home)))
    return home


def words_of(home: Path) -> list[str]:
    return [
        f"--data={home / 'data'}", f"--out_dir={home}", "--name=r", "--device=cpu", "--dtype=float32", "--encoding=carope",
        "--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=320", "--block_size=32", "--micro_batch=4",
        "--tokens_per_step=256", "--steps=4", "--warmup_steps=2", "--eval_every=4", "--eval_tokens=500",
        "--final_eval_tokens=500", "--save_every=2",
    ]  # fmt: skip


@pytest.fixture
def home(begun: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(begun, tmp_path / "home"))


@pytest.fixture
def canary(tmp_path: Path):
    """The path of the file that must not appear."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def refusal(call: Callable[[], Any]) -> str:
    """What `call` says where it refuses, one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)


def main_of(script: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    """A script's main in this process, under its command line."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    return script.main.__wrapped__()


def readers(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """The commands that open a run."""
    eval_words = ["--lengths", 16, "--max_tokens", 100, "--data", home / "data", "--device", "cpu"]
    return {
        "train.py": lambda: train(load_config(words_of(home))),
        "eval_ppl.py": lambda: main_of(eval_ppl, monkeypatch, home / "r", *eval_words),
        "sample.py": lambda: main_of(sample, monkeypatch, home / "r", "--max_new_tokens", 3, "--device", "cpu"),
    }


def edit_state(checkpoint: Path, **values: Any) -> None:
    """Other values in state.json; its sha256 of itself is put right."""
    (checkpoint / STATE).write_text(sealed(json.loads((checkpoint / STATE).read_text()) | values))


def edit_config(checkpoint: Path, **values: Any) -> None:
    """Other values in the configuration that state.json holds."""
    edit_state(checkpoint, config=json.loads((checkpoint / STATE).read_text())["config"] | values)


def fix_sum(checkpoint: Path, name: str) -> None:
    """Let state.json vouch for a file."""
    sums = json.loads((checkpoint / STATE).read_text())["sha256"]
    edit_state(checkpoint, sha256=sums | {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()})


# ---------------------------------------------------------------- pickles


def test_the_pickles_of_this_file_do_what_they_should(fault, tmp_path):
    happened = fault("the malicious pickles, loaded by those who do load pickles")
    load = {
        "pickle": lambda data: pickle.loads(data.getvalue()),
        "torch.save": lambda data: torch.load(data, weights_only=False),
        "numpy.save": lambda data: np.load(data, allow_pickle=True),
    }
    for name, form in FORMS.items():
        load[name](io.BytesIO(form(Malice(tmp_path / name))))
        assert (tmp_path / name).exists()
    happened("each creates its canary: the tests below have teeth", forms=len(FORMS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_in_a_checkpoint(fault, home, canary, monkeypatch, capsys, name, form, vouched):
    happened = fault(f"{form} of a malicious object as {name}, its sha256 in state.json {'right' if vouched else 'wrong'}")
    shutil.rmtree(home / "r/checkpoints/step_000002")
    (home / NEWEST / name).write_bytes(FORMS[form](Malice(canary)))
    if vouched:
        fix_sum(home / NEWEST, name)
    seen = []
    for script, read in readers(home, monkeypatch).items():
        if vouched and name == OPTIMIZER and script != "train.py":
            read()  # they read the weights only
            seen.append(f"{script}: the file is not read")
            continue
        message = refusal(read)
        none = "none of them is whole" if script == "train.py" else "no valid checkpoint in it"
        assert (f"{name}: not a readable safetensors file" if vouched else none) in message
        seen.append(f"{script}: refused")
    if not vouched:
        assert f"{name}: its sha256 is not the one in state.json" in capsys.readouterr().err
    happened(f"canary untouched; {', '.join(seen)}", commands=len(seen))


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_as_state(fault, home, canary, monkeypatch, capsys, form):
    happened = fault(f"{form} of a malicious object as the newest state.json, and as both")
    payload = FORMS[form](Malice(canary))
    (home / NEWEST / STATE).write_bytes(payload)
    for script, read in readers(home, monkeypatch).items():
        shutil.copytree(home / "r", home / "kept")
        assert not read()
        assert "step_000004/state.json: its text: Invalid JSON" in capsys.readouterr().err, script
        shutil.rmtree(home / "r")
        (home / "kept").rename(home / "r")
    (home / "r/checkpoints/step_000002" / STATE).write_bytes(payload)
    assert "no valid checkpoint in it" in refusal(lambda: load_model(home / "r"))
    assert "Invalid JSON" in refusal(lambda: load_model(home / NEWEST))
    happened("canary untouched; the newest is passed over with a warning by train.py, eval_ppl.py, sample.py; both: refused")


BESIDES = [
    "env.json", "log.jsonl", "config.toml", LOCK, "optimizer.pt", "checkpoints/optimizer.pt", f"{NEWEST[2:]}/optimizer.pt",
    f"{NEWEST[2:]}/model.pt", f"{NEWEST[2:]}/pytorch_model.bin", "checkpoints/step_000009", "eval.json",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_pickles_everywhere_else_in_a_run_folder(fault, home, canary, monkeypatch, form):
    happened = fault(f"{form} of a malicious object as {', '.join(BESIDES)}")
    shutil.rmtree(home / NEWEST)
    (home / "r/checkpoints/step_000002").rename(home / NEWEST)  # of another step than its name says: damaged
    shutil.copytree(home / NEWEST, home / "r/checkpoints/step_000002")
    for name in BESIDES:
        (home / "r" / name).write_bytes(FORMS[form](Malice(canary)))
    for read in readers(home, monkeypatch).values():
        assert not read()
    starts = json.loads((home / "r/env.json").read_text())
    assert [start["from_step"] for start in starts] == [2]
    happened(
        "canary untouched; train.py went on from step 2 to the end, eval_ppl.py and sample.py did their work",
        files=len(BESIDES),
    )


def test_nested_brackets_in_the_files_beside_the_checkpoints(fault, home):
    happened = fault("100,000 opening brackets as env.json and as a line of log.jsonl")
    shutil.rmtree(home / NEWEST)
    (home / "r/env.json").write_text("[" * 100_000)
    with open(home / "r/log.jsonl", "a") as log:
        log.write("[" * 100_000 + "\n")
    assert train(load_config(words_of(home))) == 0
    happened("both count as damaged; the run went on to its end")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["train_000002.bin", "val_000000.bin", "train_000002.npy", "val_000000.npy", MANIFEST])
def test_a_pickle_in_a_data_folder(fault, home, canary, name, form):
    happened = fault(f"{form} of a malicious object as {name} of a data folder")
    path = home / "data" / name
    path.with_suffix(".bin").unlink(missing_ok=True)
    path.write_bytes(FORMS[form](Malice(canary)))
    for check in ("quick", "full"):
        message = refusal(lambda check=check: train(load_config([*words_of(home), "--name=new", f"--verify_data={check}"])))
        assert message.startswith(f"{path}: ")
    assert refusal(lambda: TokenStream(home / "data", name.split("_")[0].replace(MANIFEST, "val"), 320)).startswith(f"{path}: ")
    happened(f"canary untouched; refused: {message.split(': ', 1)[1]}")


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_as_a_config_file(fault, canary, tmp_path, form):
    happened = fault(f"{form} of a malicious object as a config file")
    (tmp_path / "c.toml").write_bytes(FORMS[form](Malice(canary)))
    assert refusal(lambda: load_config([str(tmp_path / "c.toml")])).startswith(f"{tmp_path / 'c.toml'}: not TOML")
    happened("canary untouched; refused as not TOML")


def job_in(folder: Path, val_tokens: int = 100) -> Job:
    """A preparation of a small text into `folder`/out."""
    (folder / "text.txt").write_text("so it is. " * 50)
    (folder / "out").mkdir(exist_ok=True)
    return Job([str(folder / "text.txt")], folder / "out", "bytes", 1000, val_tokens, None, 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_in_a_folder_being_prepared(fault, canary, tmp_path, form):
    happened = fault(f"{form} of a malicious object as .progress.json and manifest.json of a preparation")
    job = job_in(tmp_path)
    for name in (PROGRESS, MANIFEST):
        (job.out / name).write_bytes(FORMS[form](Malice(canary)))
        assert refusal(lambda: prepare(job)).startswith(f"{job.out / name}: ")
        (job.out / name).unlink()
    prepare(job)
    assert json.loads((job.out / MANIFEST).read_text())["tokens"] == 501
    happened("canary untouched; refused by name; without them the preparation runs")


def test_the_commands_say_it_in_one_line_with_exit_code_2(fault, home, canary):
    happened = fault("train.py, eval_ppl.py and sample.py on a run whose weights are a pickle that state.json vouches for")
    (home / NEWEST / MODEL).write_bytes(pickled(Malice(canary)))
    fix_sum(home / NEWEST, MODEL)
    for words in (["train.py", *words_of(home)], ["eval_ppl.py", home / "r"], ["sample.py", home / "r"]):
        done = run_command(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith(f"error: {home / NEWEST / MODEL}: not a readable safetensors file")
    happened("canary untouched; exit code 2, one line", commands=3)


# ---------------------------------------------------------------- names and paths


@pytest.fixture
def outside(tmp_path: Path):
    """A shard beside the folder at work, and a check that nothing beside that folder was made, changed or deleted."""
    write_shard(tmp_path / "victim.bin", np.arange(200, dtype=np.uint16))
    at = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    yield tmp_path / "victim.bin"
    now = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name not in ("home", "out", "text.txt")}
    assert now == {path: time for path, time in at.items() if path.name not in ("home", "out", "text.txt")}


@pytest.mark.parametrize("name", ["../x", "/x", "..", ".", "a/b", "x/..", "a/../../x", "\0", "x\n"])
def test_a_name_of_a_run_cannot_escape(fault, home, outside, name):
    happened = fault(f"--name={name!r}, and the same as `name` in a config file")
    if name == "/x":
        name = str(outside.parent / "x")
    assert "name" in refusal(lambda: load_config([*words_of(home), f"--name={name}"]))
    (home / "c.toml").write_text(f"name = {json.dumps(name)}\n")
    words = [word for word in words_of(home) if not word.startswith("--name")]
    message = refusal(lambda: train(load_config([*words, str(home / "c.toml")])))
    assert message.startswith(f"name = {name!r}: ")
    happened(f"refused, nothing made outside: {message.split(': ', 1)[1]}")


ESCAPES = {"{outside}": "an absolute path"} | {
    path: repr(path) for path in ("../victim.bin", "sub/../../victim.bin", "..", "", "sub/train_000001.bin", "x\n", "\0")
}


@pytest.mark.parametrize("path", ESCAPES)
def test_a_manifest_cannot_lead_outside(fault, home, outside, path):
    happened = fault(f"manifest.json lists {ESCAPES[path]} as a shard")
    path = path.format(outside=outside)
    manifest = json.loads((home / "data" / MANIFEST).read_text())
    for shard in manifest["shards"][:2]:
        changed = [{**other, "file": path, "tokens": 200} if other == shard else other for other in manifest["shards"]]
        (home / "data" / MANIFEST).write_text(json.dumps(manifest | {"shards": changed}))
        message = refusal(lambda: train(load_config([*words_of(home), "--name=new"])))
        assert message.startswith(f"{home / 'data' / MANIFEST}: ") and f"{path!r} is not a plain file name" in message
        assert (home / "data" / MANIFEST).exists()
    happened("refused by name, nothing outside read or touched")


@pytest.mark.parametrize("name", [PROGRESS, MANIFEST])
@pytest.mark.parametrize("path", ESCAPES)
def test_a_folder_being_prepared_cannot_lead_outside(fault, tmp_path, outside, path, name):
    happened = fault(
        f"{name} lists {path!r} as a finished shard, of a preparation that would delete it: nothing left to train on"
    )
    path = path.format(outside=outside)
    job = job_in(tmp_path, val_tokens=900)
    source = open_source(job.source, job.out / "scratch", None)
    entry = {"file": path, "split": "val", "tokens": 200, "documents": 1, "sha256": "0" * 64}
    entry["end"] = {"file": 0, "item": 0, "offset": 200, "null": 0, "empty": 0}
    terms = job.terms | {"revision": None, "files": [[file.name, file.size] for file in source.files]}
    (job.out / name).write_text(json.dumps(terms | {"n_vocab": 257, "shards": [entry]}))
    message = refusal(lambda: prepare(job))
    assert message.startswith(f"{job.out / name}: ") and f"{path!r} is not a plain file name" in message
    assert outside.stat().st_size == HEADER_BYTES + 400
    happened("refused by name, the file outside is still there")


@pytest.mark.parametrize("key", ["name", "out_dir", "data"])
def test_a_checkpoint_whose_config_leads_outside_writes_nothing(fault, home, outside, monkeypatch, key):
    happened = fault(f"state.json with {key} = '../x', and with a line break in it")
    edit_config(home / NEWEST, **{key: "../x"})
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    (result,) = evaluate_run(home / "r", [16], CPU, max_tokens=100, data=str(home / "data"))
    assert result["tokens"] == 100
    readers(home, monkeypatch)["sample.py"]()
    assert before == {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    edit_config(home / NEWEST, **{key: "a\nb"})
    assert "control characters" in refusal(lambda: load_model(home / NEWEST))
    happened("evaluated and sampled from, nothing written anywhere; with a line break: refused in one line")


# ---------------------------------------------------------------- sizes


HUGE = {
    "n_layer": 10**9, "n_embd": 10**9, "vocab_size": 10**9, "block_size": 10**12, "n_head": 10**12, "steps": 10**30,
    "all at their limits": {
        "n_layer": 1000, "n_head": 65536, "n_embd": 65536, "vocab_size": 65536, "block_size": 2**24, "tokens_per_step": 2**40,
        "encoding": "learned",
    },
}  # fmt: skip


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("key", HUGE)
def test_the_sizes_in_a_strangers_checkpoint_cost_nothing(fault, home, key):
    happened = fault(f"state.json whose configuration has {key}{'' if 'all' in key else f' = {HUGE[key]:,}'}")
    value = HUGE[key]
    edit_config(home / NEWEST, **(value if isinstance(value, dict) else {key: value}))
    peak, clock = peak_megabytes(), time.perf_counter()
    messages = [refusal(lambda: load_model(home / NEWEST)), refusal(lambda: train(load_config(words_of(home))))]
    grown, seconds = peak_megabytes() - peak, time.perf_counter() - clock
    assert grown < 100
    happened(f"refused: {messages[0].split(': ', 1)[1]}", megabytes_more=round(grown, 1), seconds=round(seconds, 2))


def test_a_file_that_promises_more_than_it_has(fault, home):
    happened = fault("model.safetensors whose header gives a tensor 10^12 values, an .npy shard of 10^12 tokens")
    path = home / NEWEST / MODEL
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["wte.weight"] |= {"shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    fix_sum(home / NEWEST, MODEL)
    peak = peak_megabytes()
    assert "not a readable safetensors file" in refusal(lambda: load_model(home / NEWEST))
    np.save(shard := home / "data/train_000009.npy", np.zeros(100, dtype=np.uint16))
    shard.write_bytes(shard.read_bytes().replace(b"(100,), }             ", b"(1000000000000,), }   "))
    assert b"(1000000000000,)" in shard.read_bytes()
    assert refusal(lambda: train(load_config([*words_of(home), "--name=new"]))).startswith(
        f"{shard}: not a readable .npy shard"
    )
    assert peak_megabytes() - peak < 100
    happened("both refused by name", megabytes_more=round(peak_megabytes() - peak, 1))


# ---------------------------------------------------------------- another model's checkpoint


OTHERS = {
    "encoding": ("'carope'", "'rope'"), "n_layer": ("1", "2"), "n_head": ("2", "4"), "n_embd": ("16", "32"),
    "vocab_size": ("320", "512"), "block_size": ("32", "16"),
}  # fmt: skip


@pytest.mark.parametrize("fields", [[key] for key in OTHERS] + [list(OTHERS)], ids=lambda fields: "-".join(fields))
def test_a_checkpoint_of_another_model_is_refused_with_the_fields_that_differ(fault, home, fields):
    happened = fault(f"the run of a folder continued with another {', '.join(fields)}")
    before = {path: path.stat().st_mtime_ns for path in (home / "r").rglob("*") if path.is_file()}
    words = [f"--{key}={OTHERS[key][1].strip(chr(39))}" for key in fields]
    message = refusal(lambda: train(load_config([*words_of(home), *words])))
    named = ", ".join(f"{key} = {OTHERS[key][0]} (now {OTHERS[key][1]})" for key in OTHERS if key in fields)
    assert set(named.split(", ")) == set(message.split(" with ")[1].split(";")[0].split(", "))
    assert before == {path: path.stat().st_mtime_ns for path in (home / "r").rglob("*") if path.is_file()}
    happened(f"refused, nothing touched: {message.split(': ', 1)[1]}", fields=len(fields))


@pytest.mark.parametrize("key", OTHERS)
def test_weights_that_are_not_what_state_says_are_refused(fault, home, key):
    happened = fault(f"state.json of {key} = {OTHERS[key][1]} beside the weights of {OTHERS[key][0]}")
    if key == "block_size":  # shows in the weights of one encoding only
        edit_config(home / NEWEST, encoding="learned")
    edit_config(home / NEWEST, **{key: json.loads(OTHERS[key][1].replace("'", '"'))})
    message = refusal(lambda: load_model(home / NEWEST))
    assert message.startswith(f"{home / NEWEST / MODEL}: ") and " has shape " in message
    happened(f"refused: {message.split(': ', 1)[1]}")


def test_weights_of_another_type_are_refused(fault, home):
    happened = fault("model.safetensors in bfloat16, and optimizer.safetensors with averages in float64")
    for name, dtype in ((MODEL, torch.bfloat16), (OPTIMIZER, torch.float64)):
        path = home / NEWEST / name
        tensors = load_file(path)
        shutil.copy(path, home / "kept")
        save_file({key: value if key.startswith("rng.") else value.to(dtype) for key, value in tensors.items()}, path)
        fix_sum(home / NEWEST, name)
        assert f"is {dtype}, the model's is torch.float32" in refusal(lambda: train(load_config(words_of(home))))
        shutil.copy(home / "kept", path)
        fix_sum(home / NEWEST, name)
    assert train(load_config(words_of(home))) == 0
    happened("refused by name, with both types")


def test_a_run_of_another_tokenizer_is_refused(fault, home):
    happened = fault("a run of one tokenizer continued and evaluated on data of another, of as many tokens")
    manifest = json.loads((home / "data" / MANIFEST).read_text())
    (home / "data" / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": "other"}))
    assert "tokenizer = 'bytes' (now 'other')" in refusal(lambda: train(load_config(words_of(home))))
    message = refusal(lambda: evaluate_run(home / "r", [16], CPU, data=str(home / "data")))
    assert "tokenized by 'other'" in message and "trained on 'bytes'" in message
    happened("refused by both, with both names")
