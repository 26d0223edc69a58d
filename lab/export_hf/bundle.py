"""Our own sources as the flat files that `trust_remote_code` loads beside the weights: one implementation, copied.

transformers follows relative imports of files in one folder only, so `positional/base.py` becomes `positional_base.py` and
`from positional.base import …` becomes `from .positional_base import …`; nothing else in a file is changed. Of the encodings
there are only the model's and what it is made of; a plugin's file is taken along, too.
"""

import ast
import hashlib
import re
import sys
from pathlib import Path

import positional
from core.errors import UserError
from core.files import ROOT

OURS = ("model", "positional", "core", "lab", r"plugin_\w+")
START = "lab.export_hf.modeling_carope"
CONFIGURATION = "lab.export_hf.configuration_carope"
ALL_FILES = """
if False:  # never: transformers 4 takes along the files that this one names, not what those need
"""
IMPORT = re.compile(rf"^([ \t]*from )((?:{'|'.join(OURS)})(?:\.\w+)*)(?= import)", re.MULTILINE)
# The files that are no copies: without Triton, which transformers would want installed, and without C++
REPLACED = {
    "core.kernels.support": '''"""Stands for core/kernels/support.py: here PyTorch rotates, and Triton is not needed."""

from typing import Any


def rotation_kernel(kernel: str) -> None:
    """No kernel."""


def key_bias_kernel(device: Any) -> None:
    """No kernel."""


def cross_entropy_kernel(device: Any) -> None:
    """No kernel."""
''',
    "core.kernels.native": '''"""Stands for core/kernels/native.py: here attention is PyTorch's own, and no C++ is compiled."""

LANES = 16


def native() -> None:
    """Nothing."""
''',
}


def bundle(encoding: str) -> dict[str, str]:
    """File name → text of `modeling_carope.py` and every file of ours that it needs with this encoding.

    Raises UserError where the encoding's class is in no file of positional/ and in no plugin.
    """
    texts: dict[str, str] = {}
    waiting, replaced = [START], REPLACED | {"positional": registry(encoding)}
    while waiting:
        module = waiting.pop()
        if flat(module) in texts:
            continue
        text = replaced.get(module) or source(module)
        texts[flat(module)] = IMPORT.sub(lambda found: f"{found[1]}.{flat(found[2])}", text)
        waiting += [name for name in imported(text) if re.fullmatch("|".join(OURS), name.partition(".")[0])]
    others = sorted(texts.keys() - {flat(START)})
    texts[flat(START)] += ALL_FILES + "".join(f"    from .{name} import __name__\n" for name in others)
    code = hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()
    texts[flat(CONFIGURATION)] += (
        f'\nCODE = "{code}"  # of all files here: transformers takes a class for another\'s if this file is\n'
    )
    return {f"{name}.py": text for name, text in sorted(texts.items())}


def registry(encoding: str) -> str:
    """What stands for positional/__init__.py: what a file of an encoding may import from there, and the encoding."""
    cls = positional.ENCODINGS[encoding]
    if not re.match(r"(positional\.|plugin_)", cls.__module__):
        raise UserError(
            f"encoding = {encoding!r}: its class is in {cls.__module__}, and only what is in positional/ or in a plugin can be "
            "written beside the weights; move it there"
        )
    names = [name for name in positional.__all__ if name != "RoPE"]
    imports = [("positional.base", name) for name in names] + [("positional.rotary", "RoPE"), (cls.__module__, cls.__name__)]
    lines = [f"from {module} import {name}  # noqa: F401\n" for module, name in imports]
    return f'"""Stands for positional/__init__.py: the encoding of this model alone."""\n\n{"".join(lines)}'


def flat(module: str) -> str:
    """The name of a module in the one folder, e.g. positional_base."""
    return module.removeprefix("lab.export_hf.").replace(".", "_")


def source(module: str) -> str:
    """The text of one of our modules, or of a plugin. Raises UserError where a plugin needs a file beside it."""
    if module.startswith("plugin_"):
        path = Path(str(sys.modules[module].__file__))
        text = path.read_text(encoding="utf-8")
        beside = {file.stem for file in path.parent.glob("*.py")} & {name.partition(".")[0] for name in imported(text)}
        if beside:
            raise UserError(f"{path}: imports {min(beside)}.py beside it, and an export takes one file; put it all into one")
        return text
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def imported(text: str) -> set[str]:
    """The modules that a file imports."""
    nodes = list(ast.walk(ast.parse(text)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
