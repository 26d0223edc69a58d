"""Imports go one way: base modules → model → eval_ppl → {train, sample} → benchmarks → table1; positional.py stands alone."""

import ast

from conftest import ROOT

MODULES = {path.stem: [path] for path in ROOT.glob("*.py")}
MODULES |= {path.parent.name: [*path.parent.glob("*.py")] for path in ROOT.glob("*/__init__.py")}  # a package is one module
LAYERS = [
    {"positional", "system"},
    {"kernels"},
    {"config", "launch", "text"},
    {"data", "distributed"},
    {"model"},
    {"training"},
    {"evaluation"},
    {"huggingface"},
    {"eval_ppl", "prepare_fineweb", "sample", "export_hf", "eval_tasks"},
    {"analysis", "train"},
    {"benchmarks"},
    {"experiments"},
    {"analyze", "bench", "lab", "table1"},
    {"report"},
]
# kernels/support.py imports the first four where Triton is there and wanted, transformers the others
ON_DEMAND = {
    "cross_entropy_tiles.py", "key_bias_tiles.py", "rotary.py", "rotary_tiles.py", "configuration_carope.py",
    "modeling_carope.py",
}  # fmt: skip
RUNS_WITH = {"torch", "numpy", "tqdm", "pydantic", "safetensors"}  # what train, eval and sample need, and no more


def imports(module: str, top_only: bool = False) -> set[str]:
    trees = [ast.parse(path.read_text()) for path in MODULES[module] if not (top_only and path.name in ON_DEMAND)]
    nodes = [node for tree in trees for node in (tree.body if top_only else ast.walk(tree))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_imports_go_one_way():
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    assert set(level) == set(MODULES)
    for module in MODULES:
        for other in imports(module) & set(MODULES) - {module}:
            assert level[other] < level[module], f"{module} imports {other}"


def test_positional_imports_torch_and_nothing_of_ours():
    assert imports("positional") - {"collections", "math", "typing"} == {"positional", "torch"}


def test_nobody_imports_train():
    assert not [module for module in MODULES if "train" in imports(module)]


def test_heavy_packages_are_imported_only_where_they_are_used():
    import sys

    for module in MODULES:
        foreign = imports(module, top_only=True) - set(MODULES) - set(sys.stdlib_module_names)
        assert foreign <= RUNS_WITH, f"{module} imports {foreign - RUNS_WITH} at its top"
