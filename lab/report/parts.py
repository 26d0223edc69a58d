"""Parts of the report's page: cells, tables, the line of each run, the ticks of a logarithmic axis."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.report.data import RunRecord

COLORS = 8  # --c0 … in page/style.css
DASHES = ["solid", "7px,3px", "2px,3px", "9px,3px,2px,3px", "15px,4px", "15px,4px,2px,4px"]
MARKERS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, what stands small after it, its number where columns are compared."""

    text: str
    small: str = ""
    value: float | None = None
    kind: str = ""  # CSS class: n a number, k one line, mid room for a name, long room for a sentence
    swatch: str = ""

    def render(self) -> str:
        data = f' data-value="{self.value!r}"' if self.value is not None else ""
        small = f" <small>{html.escape(self.small)}</small>" if self.small else ""
        return f'<td class="{self.kind}"{data}>{self.swatch}{html.escape(self.text)}{small}</td>'


Row = tuple[int | None, Sequence[Cell]]  # number of the run that it belongs to, and hides with


def table(head: Sequence[str], rows: Sequence[Row], kind: str = "") -> str:
    """An HTML table; columns of numbers stand to the right."""
    numeric = [all(cells[i].kind == "n" for _, cells in rows) for i in range(len(head))]
    top = "".join(f'<th class="{"n" if n else ""}">{html.escape(h)}</th>' for h, n in zip(head, numeric, strict=True))
    body = "\n".join(f"<tr{of_run(run)}>{''.join(cell.render() for cell in cells)}</tr>" for run, cells in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def of_run(run: int | None) -> str:
    """The attribute by which the page's script hides an element with its run."""
    return "" if run is None else f' data-run="{run}"'


def section(title: str, text: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{text}</section>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def folded(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{text}</details>"


def finite(value: object) -> float | None:
    """`value` where it is a number that a plot can show."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(value: object, form: str = ",.2f", unit: str = "") -> Cell:
    """A number, or – where there is none."""
    return Cell(f"{value:{form}}{unit}" if isinstance(value, int | float) else "–", kind="n")


def perplexity(result: Mapping[str, Any]) -> Cell:
    """Perplexity ± its standard error."""
    mean, error = finite(result.get("perplexity")), finite(result.get("stderr"))
    if mean is None:
        return number(None) if result.get("perplexity") is None else Cell("∞", kind="n")
    return Cell(f"{mean:,.2f}", "" if error is None else f"± {error:.2f}", mean, "n")


def scored(metrics: Mapping[str, Any], metric: str) -> Cell:
    """A task's metric ± its standard error."""
    value, error = finite(metrics.get(metric)), finite(metrics.get(f"{metric}_stderr"))
    return number(None) if value is None else Cell(f"{value:.4g}", "" if error is None else f"± {error:.2g}", kind="n")


def setting(value: object) -> Cell:
    """A setting as the configuration files write it."""
    if isinstance(value, bool):
        return Cell(str(value).lower())
    if isinstance(value, int | float):
        return Cell(f"{value:,d}" if isinstance(value, int) else f"{value:g}", kind="n")
    return Cell("–" if value is None else str(value))


def styles(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Color, dash and marker of each run: a color per encoding, dashes that differ between its seeds and its neighbors."""
    encodings = list(dict.fromkeys(r.encoding for r in records))
    count = dict.fromkeys(encodings, 0)
    found = []
    for r in records:
        e, nth = encodings.index(r.encoding), count[r.encoding]
        count[r.encoding] += 1
        dash = DASHES[(e + nth + 2 * (e // COLORS)) % len(DASHES)]
        found.append({"color": e % COLORS, "dash": dash, "marker": MARKERS[(e + nth) % len(MARKERS)]})
    return found


def swatch(style: Mapping[str, Any]) -> str:
    """A piece of the run's line."""
    dash = "" if style["dash"] == "solid" else f' stroke-dasharray="{style["dash"].replace("px", "")}"'
    line = f'<line x2="30" y1="4" y2="4"{dash}/>'
    return f'<svg class="swatch" style="color:var(--c{style["color"]})" aria-hidden="true">{line}</svg>'


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around positive `values`; finer steps where they span less than a factor of four."""
    low, high = min(values), max(values)
    factors = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high < 4 * low else (1, 2, 5)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [round(f * 10.0**d, 10) for d in decades for f in factors if low / 2 <= f * 10.0**d <= high * 2]
