"""Where a number came from: the commit is this tree's, and the source of an encoding is what is computed, whoever asks."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command

from core.config import load_config
from core.fingerprint import probe, same_probe, source_of
from positional import ENCODINGS

COMMIT = "from core.provenance import git_version; print(git_version())"
SOURCES = "import json; from core.fingerprint import *; print(json.dumps({name: source_of(name) for name in ENCODINGS}))"


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def commit_all(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    return git(folder, "rev-parse", "HEAD")


def asked(folder: Path, what: str = COMMIT, **env: str) -> str:
    done = run_command(
        "-c", what, cwd=folder, env={"CAROPE_COMMIT": "", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"} | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the source, without .git, in a folder that the repository around it ignores."""
    (tmp_path / ".gitignore").write_text("copy\n")
    folder = tmp_path / "copy"
    for name in ("positional", "core", "text"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "model.py", folder)
    return folder


@pytest.mark.slow
def test_another_projects_commit_is_not_ours(copy):
    around = commit_all(copy.parent)
    assert asked(copy) == "None"
    mine = commit_all(copy)
    assert mine != around and asked(copy) == mine
    assert asked(copy, GIT_DIR=str(copy.parent / ".git"), GIT_WORK_TREE=str(copy.parent), GIT_INDEX_FILE="/nowhere") == mine
    (copy / "core/distributed.py").write_text("import torch\n" + (copy / "core/distributed.py").read_text())
    assert asked(copy) == f"{mine}-dirty"


def test_the_source_of_an_encoding_changes_with_what_it_computes_and_with_nothing_else(copy):
    here = {name: source_of(name) for name in ENCODINGS}
    for path in (copy / "positional").glob("*.py"):  # another docstring, comments, blank lines
        first, rest = path.read_text().split("\n", 1)
        assert first.startswith('"""')
        text = f"{first[:3]}Other words. {first[3:]}\n{rest}".replace("\n\n\n", "\n\n# a # comment\n\n  \n\n")
        path.write_text(text.replace("\n        return ", "\n        # why\n        return ") + "\n# the end")
    (copy / "positional/comrope.py").rename(copy / "positional/elsewhere.py")  # a class moves to another file
    text = (copy / "positional/rotary.py").read_text()  # what only says something, and the name
    text = text.replace('@register("xpos")', '@register("xpos2")').replace("tokens over which q · k", "how slowly q · k")
    (copy / "positional/rotary.py").write_text(text.replace("512.0,", "256.0,").replace("ends where fp32", "and where fp32"))
    here["xpos2"] = here.pop("xpos")
    assert json.loads(asked(copy, SOURCES)) == here
    # A base that is named by its module, and has the name of the class, is part of it too
    text = 'import positional\n@positional.register("named")\nclass RoPE(positional.RoPE):\n    inclusive = True\n'
    (copy / "positional/named.py").write_text(text)
    here = json.loads(asked(copy, SOURCES))
    rotary = copy / "positional/rotary.py"
    rotary.write_text(rotary.read_text().replace("return theta ** torch", "return 1.0 * theta ** torch"))
    changed = {name for name, source in json.loads(asked(copy, SOURCES)).items() if source != here[name]}
    assert {"named", "rope", "carope", "comrope", "sinusoidal"} <= changed and not {
        "nope",
        "alibi",
        "cable",
        "cope",
        "path",
    } & changed


def test_the_probe_tells_encodings_apart_and_disturbs_nothing():
    """All that differ within 64 tokens; CARoPE held at its start is RoPE, and bf16 rounds no position below 256."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = {name: probe(load_config(["config/demo.toml", f"--encoding={name}"])) for name in ENCODINGS}
    assert torch.equal(torch.get_rng_state(), before)
    same = {(a, b) for a in found for b in found if a < b and same_probe(found[a], found[b])}
    assert same == {("carope_frozen", "rope"), ("carope_frozen", "rope_bf16pos"), ("rope", "rope_bf16pos")}
    small = ["config/demo.toml", "--block_size=512", "--tokens_per_step=16384"]
    long = [probe(load_config([*small, f"--encoding={name}"])) for name in ("rope", "rope_bf16pos")]
    assert not same_probe(*long)


def test_the_probe_is_of_the_encoding_its_options_and_the_width_and_of_nothing_else():
    words = ["config/demo.toml", "--encoding=rope"]
    one = probe(load_config(words))
    others = ["--seed=7", "--lr=1e-2", "--n_layer=3", "--residual=bfloat16", "--kernel=eager", "--steps=9", "--warmup_steps=1"]
    assert probe(load_config([*words, *others])) == one
    assert not same_probe(probe(load_config([*words, "--rope_base=9000"])), one)
    assert same_probe(None, one) and same_probe(one, None) and not same_probe(one, {"loss": one["loss"]})


def test_an_encoding_that_cannot_run_on_a_cpu_has_no_probe(monkeypatch):
    monkeypatch.setattr(ENCODINGS["alibi"], "coords", lambda *_: 1 / 0)
    assert probe(load_config(["config/demo.toml", "--encoding=alibi", "--block_size=32"])) is None
