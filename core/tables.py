"""Tables in Markdown: for a terminal, a report and the pages of docs/."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.files import atomic_write

NUMBER = re.compile(r"–$|inf|[-+−≥≤$ ]*\d")  # how a cell begins that is one


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table; a column of numbers is right-aligned."""
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    marks = ["---:" if cells and all(NUMBER.match(str(cell)) for cell in cells) else "---" for cells in columns]
    lines = ["|".join(f" {cell} " if str(cell) else " " for cell in row) for row in (head, *rows)]
    return "".join(f"|{line}|\n" for line in (lines[0], "|".join(marks), *lines[1:]))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; of a single value the error is unknown."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def plus_minus(value: float | None, error: float | None, form: str) -> str:
    """Value ± error, each with `form`'s decimals (and the value with its sign); – where there is none."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def write_blocks(page: Path, blocks: Mapping[str, str]) -> None:
    """Put each text of `blocks` into `page` between the lines <!-- its name --> and <!-- end -->, in place of what is there."""
    whole = page.read_text()
    for name, text in blocks.items():
        before, rest = whole.split(f"<!-- {name} -->\n")
        whole = f"{before}<!-- {name} -->\n{text}<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    with atomic_write(page, "w") as file:
        file.write(whole)
