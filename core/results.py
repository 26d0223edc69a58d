"""The results of evaluations: what decides each number, the file they are kept in, and their table.

A result is a JSON object. Its fields of `Question` are all that decides its number, so a file is searched with a question: the
answer is the result that has the same values. Anything less takes a number for another.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from core.checkpoint import MODEL, State
from core.distributed import format_name, pick_device, pick_dtype
from core.errors import UserError
from core.fingerprint import source_of
from text.shards import is_of

Result = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What was evaluated on what, and how."""

    length: int  # tokens of a window
    stride: int  # tokens from one window to the next
    max_tokens: int  # 0: no limit
    min_document_tokens: int | None  # None: the documents were read one after the other
    rope_scaling: str | None
    scale: float | None
    dtype: str  # autocast type, "float32" for none
    weights: str  # sha256 of the file
    data_sha256: list[str]  # of the validation shards, in their order
    source: str | None  # core.fingerprint.source_of the encoding

    @classmethod
    def standard(
        cls, state: State, length: int, device: str, max_tokens: int = 0, min_document_tokens: int | None = None
    ) -> "Question":
        """The checkpoint's `state` in windows that do not overlap, on the data and in the number format of its training."""
        return cls(
            length=length,
            stride=length,
            max_tokens=max_tokens,
            min_document_tokens=min_document_tokens,
            rope_scaling=None,
            scale=None,
            dtype=own_dtype(state, device),
            weights=state.sha256[MODEL],
            data_sha256=[shard.sha256 for shard in state.shards if is_of("val", shard.file)],
            source=source_of(state.config["encoding"]),
        )

    def answer(self, results: Iterable[Result]) -> Result | None:
        """The result that answers it; None where none does."""
        wanted = asdict(self)
        return next((r for r in results if {key: r.get(key) for key in FIELDS} == wanted), None)


FIELDS = tuple(field.name for field in fields(Question))


def own_dtype(state: State, device: str) -> str:
    """The number format that the run was trained in; of a checkpoint that does not say, what `device` would choose."""
    return state.dtype or format_name(pick_dtype(state.config["dtype"], pick_device(device)))


def read_results(path: Path) -> list[Result]:
    """What eval_ppl.py wrote, or nothing where it has not or not in this form. Raises UserError for what cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable or move it away") from None
    return [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []


def beside(results: Sequence[Result], there: Sequence[Result]) -> list[Result]:
    """`results`, and before them those of `there` that answer other questions, or of other runs."""

    def key(result: Result) -> list[Any]:
        return [result.get(name) for name in ("run", *FIELDS)]

    new = [key(r) for r in results]
    return [*(r for r in there if key(r) not in new), *results]


def check_file(path: Path) -> None:
    """Raise UserError where a file is there that does not hold results of evaluations."""
    if path.exists() and not all("length" in r for r in read_results(path) or [{}]):
        raise UserError(f"{path}: holds no results of eval_ppl.py, so there is nothing to add to; move it away")


def special(asked: Question, own: Question) -> list[str]:
    """In words, each way in which `asked` is not `own`, what is meant by this checkpoint's perplexity at the length."""
    words = {
        f"{asked.rope_scaling} {asked.scale or 0:g}": asked.rope_scaling != own.rope_scaling,
        f"stride {asked.stride}": asked.stride != own.stride,
        f"documents {asked.min_document_tokens}": asked.min_document_tokens != own.min_document_tokens,
        f"first {asked.max_tokens}": asked.max_tokens != own.max_tokens,
        "other data": asked.data_sha256 != own.data_sha256,
        asked.dtype: asked.dtype != own.dtype,
    }
    return [word for word, differs in words.items() if differs]


def render(results: Sequence[Result]) -> str:
    """The results as a table: a row per run, a column per length, – where there is none."""
    lengths = list(dict.fromkeys(r["length"] for r in results))
    rows: dict[tuple, dict[int, str]] = {}
    for r in results:
        spread = f" ± {r['stderr']:.2f}" if r["stderr"] is not None else ""
        cell = f"{r['perplexity']:.2f}{spread}" if r["perplexity"] is not None else "–" if r["nll"] is None else "inf"
        scaled = f" {r['rope_scaling']}×{r['scale']:g}" if r.get("rope_scaling") else ""
        step = str(r["step"]) + (f" of {r['steps']}" if r["step"] < r["steps"] else "")
        rows.setdefault((r["run"], r["encoding"] + scaled, step), {})[r["length"]] = cell
    table = [("run", "encoding", "step", *map(str, lengths))]
    table += [(run, encoding, step, *(cells[n] for n in lengths)) for (run, encoding, step), cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    )


def closing(results: Sequence[Result], documents: int | None, device: str) -> str:
    """The lines below the table: what its numbers are."""
    tokens = max((r["tokens"] or 0 for r in results), default=0)
    units = "windows" if documents is None else f"documents of at least {documents:,} tokens"
    ratios = {r["tokens"] / r["bytes"] for r in results if r["bytes"]}
    bits = f", bits per byte = {ratios.pop():.4f} log2(perplexity)" if len(ratios) == 1 else ""  # of one text only
    formats = "/".join(dict.fromkeys(r["dtype"] for r in results))
    lines = [f"perplexity ± standard error over {units}, {tokens:,} tokens{bits}, {formats} on {device}"]
    if len({(r["run"], r["encoding"]) for r in results}) > 1:
        lines.append("± is each run's own; the difference of two runs on the same tokens is known better than it says")
    if unfinished := list(dict.fromkeys(r["run"] for r in results if r["step"] < r["steps"])):
        lines.append(f"not trained to the end: {', '.join(unfinished)}")
    return "\n".join(lines)
