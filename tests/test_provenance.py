"""Where a number came from: the commit is this tree's, and the source of an encoding is what is computed, whoever asks."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_command

from core.provenance import source_of
from positional import ENCODINGS

COMMIT = "from core.provenance import git_version; print(git_version())"
SOURCES = "import json; from core.provenance import *; print(json.dumps({name: source_of(name) for name in ENCODINGS}))"


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
    for name in ("positional", "core"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
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
    first = copy / "positional/__init__.py"
    first.write_text(first.read_text().replace("from positional.comrope", "from positional.elsewhere"))
    assert json.loads(asked(copy, SOURCES)) == here
    rotary = copy / "positional/rotary.py"
    rotary.write_text(rotary.read_text().replace("return theta ** torch", "return 1.0 * theta ** torch"))
    changed = {name for name, source in json.loads(asked(copy, SOURCES)).items() if source != here[name]}
    assert {"rope", "carope", "comrope", "sinusoidal"} <= changed and not {"nope", "alibi", "cable", "cope", "path"} & changed
