"""The demo's corpus: the English inside Python itself, so that nothing has to be downloaded."""

import ast
import hashlib
import json
import os
import platform
import sysconfig
import tokenize
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from text.corpus import SourceFile

TEXT_BYTES = 2_100_000  # about


class DemoCorpus:
    """What `demo_documents` gives, as a source of one jsonl file."""

    revision = None

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.fetch_bytes = scratch, TEXT_BYTES
        size = sum(path.stat().st_size for path in stdlib_files())
        self.files = [SourceFile(f"python-{platform.python_version()}.jsonl", size, TEXT_BYTES)]

    def fetch(self, index: int) -> AbstractContextManager[Path]:
        """The corpus gathered into a file of the scratch folder."""
        path = self.scratch / self.files[index].name
        self.scratch.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_documents()))
        return nullcontext(path)


def demo_documents() -> list[str]:
    """pydoc's topics and the standard library's docstrings, one document per topic and per module.

    They are in the order of their hashes, so that validation and training are alike.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = list(topics.values())
    for path in stdlib_files():
        fresh = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen and len(text) >= 40]
        seen.update(fresh)
        documents.append("\n\n".join(fresh))
    return sorted((d for d in documents if len(d) >= 200), key=lambda d: hashlib.sha256(d.encode()).digest())


def stdlib_files() -> list[Path]:
    """The standard library's modules without its tests, code tables and what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings in a module's source, which is parsed and never imported."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):  # the standard library has a few templates that are no Python
        return
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        for field in node._fields:  # those that are no lists hold expressions
            if isinstance(children := getattr(node, field), list):
                todo.extend(child for child in children if isinstance(child, ast.stmt | ast.ExceptHandler))
