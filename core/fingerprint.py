"""What an encoding computes, told apart from what another version of it does: the hash of its code, and a probe.

Every run records both; seeds of which either differs are not averaged under one name.
"""

import ast
import functools
import hashlib
import inspect
import math
import sys
import sysconfig
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from core.config import Config
from core.plugins import plugin_of, plugin_paths
from model import GPT
from positional import ENCODINGS

KIND = "syntax:"  # starts these hashes; earlier ones were of whole files and cannot be compared with them


@functools.cache
def source_of(encoding: str) -> str | None:
    """sha256 of an encoding's code, as syntax: its class, and every class, function and value that it is made of.

    It follows names to what is defined in positional/ or beside the class, but not in positional.base, which only calls
    attention; a module of the user's that is imported counts as a whole. Comments, docstrings, annotations, messages, the name
    and options of an encoding and the place of a definition do not count: the hash is the same on every machine and changes
    only with what is computed. None where there is no file.
    """
    first = ENCODINGS[encoding]
    waiting: list[tuple[str, Any, ModuleType]] = [(first.__name__, first, sys.modules[first.__module__])]
    parts: dict[tuple[str, str], str] = {}
    while waiting:
        name, value, module = waiting.pop()
        if is_plain(value):
            parts[name, ""] = repr(value)
            continue
        value = inspect.unwrap(value) if callable(value) else value  # of functools.cache
        defined = inspect.isclass(value) or inspect.isfunction(value)
        module = value if isinstance(value, ModuleType) else sys.modules[value.__module__] if defined else module
        if (name, module.__name__) in parts or not (is_of_encodings(module, first.__module__) or is_users(module)):
            continue
        try:
            if not is_of_encodings(module, first.__module__):
                tree = ast.parse(inspect.getsource(module))
            elif defined:
                tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
            else:
                nodes = ast.parse(inspect.getsource(module)).body
                tree = ast.Module([node for node in nodes if name in assigned_by(node)], [])
        except (OSError, TypeError):  # a class typed into a notebook
            return None
        parts[name, module.__name__] = syntax(Computed().visit(tree))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & vars(module).keys()
        waiting += [(name, vars(module)[name], module) for name in names]
        if inspect.isclass(value):  # a base may be written as module.Class
            waiting += [(base.__name__, base, module) for base in value.__bases__]
            waiting += [(f"{name} of {value.__name__}", one, module) for name, one in enclosed(value).items() if is_plain(one)]
    return KIND + hashlib.sha256(repr(sorted((name, text) for (name, _), text in parts.items())).encode()).hexdigest()


def is_of_encodings(module: ModuleType, beside: str) -> bool:
    """Whether what the module defines says how an encoding computes that is defined in the module `beside`."""
    name = module.__name__
    return name == beside or (name.startswith("positional.") and name != "positional.base")


def is_users(module: ModuleType) -> bool:
    """Whether a module comes from beside a plugin, and is neither ours nor installed there."""
    path = Path(getattr(module, "__file__", None) or "/").resolve()
    ours = module.__name__.partition(".")[0] in ("core", "lab", "model", "positional", "text")
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or path.is_relative_to(stdlib)
    beside = any(path.is_relative_to(Path(plugin).parent) for plugin in plugin_paths())
    return path.suffix == ".py" and beside and not ours and not installed


def is_plain(value: Any) -> bool:
    """Whether the value of a name says all in its repr, which is then the same in every process."""
    return all(map(is_plain, value)) if type(value) is tuple else isinstance(value, int | float | str)


def assigned_by(node: ast.AST) -> set[str]:
    """The names that a statement gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def enclosed(cls: type) -> dict[str, Any]:
    """What the methods of a class take from the function that it was made in."""
    methods = [value for value in vars(cls).values() if inspect.isfunction(value)]
    return {name: value for method in methods for name, value in inspect.getclosurevars(method).nonlocals.items()}


PROBE_LENGTH = 512  # tokens; a shorter block_size is taken whole
PROBE_TOLERANCE = 1e-4  # of a figure: another machine adds up in another order


def probe(cfg: Config) -> dict[str, float] | None:
    """What the encoding of `cfg` computes: loss and gradient norm of two such blocks on fixed tokens, in fp32 on a CPU.

    Weights are far from how they start, so that logits and coordinates differ from token to token. None where the encoding
    cannot run so. What the hash of `source_of` does not see, as torch's part in it, is seen here, and the other way round.
    """
    sizes: dict[str, Any] = {"n_layer": min(cfg.n_layer, 2), "n_head": cfg.n_head, "n_embd": cfg.n_embd}
    sizes |= {"vocab_size": min(cfg.vocab_size, 256), "block_size": min(cfg.block_size, PROBE_LENGTH)} | cfg.own_options
    return _probe(cfg.encoding, tuple(sizes.items()))


@functools.cache
def _probe(encoding: str, sizes: tuple[tuple[str, Any], ...]) -> dict[str, float] | None:
    plain = {"seed": 0, "kernel": "eager", "residual": "float32", "activation_checkpointing": False}
    cfg, random = SimpleNamespace(encoding=encoding, **dict(sizes), **plain), torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            model = GPT(cfg)
            for name, p in model.named_parameters():
                std = cfg.n_embd**-0.5 if name.endswith(".weight") and p.dim() > 1 else 0.1
                p.data.add_(torch.randn(p.shape, generator=random), alpha=std)
            ids = torch.randint(cfg.vocab_size, (1, cfg.block_size + 1), generator=random)
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
    except Exception:  # one that needs a GPU, say; what is wrong otherwise, the run meets itself
        return None
    found = {"loss": loss, "grad_norm": torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()}
    return {name: figure.item() for name, figure in found.items()} if all(map(torch.isfinite, found.values())) else None


def same_probe(one: Any, other: Any) -> bool:
    """Whether two probes are of the same computation, as far as they say; None says nothing."""
    if not (one and other):
        return True
    return all(math.isclose(one[key], other.get(key, math.nan), rel_tol=PROBE_TOLERANCE) for key in one)


def made_by(cfg: Config) -> dict[str, Any]:
    """What a run says of the code of its encoding: its hash, what it computes, and the plugin that it comes from."""
    plugin = plugin_of(cfg.encoding)
    file = {"path": str(plugin.path), "sha256": plugin.sha256} if plugin else None
    return {"source": source_of(cfg.encoding), "probe": probe(cfg), "plugin": file}


def other_code(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """In words, how the code of an encoding differs between two runs, each as `made_by` says it; None where it may not."""
    sources = one.get("source"), other.get("source")
    if all((source or "").startswith(KIND) for source in sources) and sources[0] != sources[1]:
        return "its code has changed"
    return None if same_probe(one.get("probe"), other.get("probe")) else "it computes something else on the same input"


def warn_of_other_code(path: Path, state: Any, now: dict[str, Any]) -> None:
    """Say it where `now`, of the encoding's code, is not what the checkpoint at `path`, of this `state`, was made by."""
    if how := other_code(vars(state), now):
        commit = f"commit {state.git[:10]} has what it was trained by" if state.git else "of which commit it was is unknown"
        print(f"warning: {path}: encoding {state.config['encoding']!r} is not what it was: {how}; {commit}", file=sys.stderr)


UNSAID = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}  # fields that decide nothing
SAYINGS = {"beyond", "changes", "family", "options"}  # attributes of an encoding that only say something


class Computed(ast.NodeTransformer):
    """Takes out of a class what only says something of it: SAYINGS, and the name that it is registered under."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Without its decorator `register`, with nothing in the place of each saying."""
        node.decorator_list = [one for one in node.decorator_list if "register" not in map(name_of, ast.walk(one))]
        for i, one in enumerate(node.body):
            target = one.targets[0] if isinstance(one, ast.Assign) else one.target if isinstance(one, ast.AnnAssign) else one
            if name_of(target) in SAYINGS:
                node.body[i] = ast.Expr(ast.Constant(""))
        return node


def name_of(node: ast.AST) -> str | None:
    """What a Name or an Attribute ends in."""
    return getattr(node, "id", getattr(node, "attr", None))


def syntax(node: Any) -> str:
    """What an abstract syntax tree computes, in the same words under every version of Python."""
    if isinstance(node, list):
        return f"[{', '.join(filter(None, map(syntax, node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return ""
    if isinstance(node, ast.JoinedStr):
        return "message"
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in UNSAID and value not in (None, []))
    return f"{type(node).__name__}({', '.join(f'{name}={syntax(value)}' for name, value in fields)})"
