"""Figures that stay legible in grey: lines differ by dash and marker too, baselines are dotted and named.

matplotlib is imported when a figure is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.files import atomic_write

COLORS = ("#1b3a6b", "#c1440e", "#2e7d4f", "#8e4b9e", "#b8860b", "#20808d", "#7a2f2f", "#555555")  # of different lightness
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X", "*"), ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))
BASELINE = {"color": "black", "linestyle": ":", "linewidth": 1.2}
DPI = 150


def line(index: int) -> dict[str, Any]:
    """How curve number `index` is drawn."""
    n = len(COLORS)
    return {
        "color": COLORS[index % n],
        "marker": MARKERS[(index + index // n) % n],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def panels(rows: int, columns: int, width: float = 5.0, height: float = 3.6, **options: Any) -> tuple[Any, Any]:
    """A figure of `rows` × `columns` axes, each `width` × `height` inches; the axes as a two-dimensional array."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def log_ticks(axis: Any, values: Sequence[int]) -> None:
    """A logarithmic x axis labeled at `values` only, at most eight of them."""
    kept = list(values)[:: -(-len(values) // 8)]
    axis.set_xscale("log")
    axis.set_xticks(kept, [str(value) for value in kept])
    axis.xaxis.minorticks_off()


def plain_log_y(axis: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    narrow = high / low < 30
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG, whole or not at all, and forget it."""
    from matplotlib import pyplot as plt

    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    plt.close(figure)


def mark_training_length(axis: Any, lengths: set[int]) -> None:
    """A vertical line at each training length, which the legend names once."""
    for i, length in enumerate(sorted(lengths)):
        axis.axvline(length, **BASELINE, label="_" * bool(i) + "training length")


def draw_profiles(results: list[dict[str, Any]], path: Path) -> None:
    """Loss against position in the window, a line per run, from what eval_ppl.evaluate_run returned.

    Of a run's lengths the longest is shown: the model is causal, so a shorter window is the beginning of the same curve.
    """
    figure, axes = panels(1, 1, width=6.5, height=4.2)
    axis = axes[0, 0]
    longest_of = {r["checkpoint"]: r for r in sorted(results, key=lambda r: r["length"]) if r.get("per_position")}
    shown = list(longest_of.values())
    for i, result in enumerate(shown):
        at = [(b["from"] * b["to"]) ** 0.5 for b in result["per_position"]]
        loss = [b["loss"] for b in result["per_position"]]
        error = [b["stderr"] or 0 for b in result["per_position"]]
        axis.plot(at, loss, label=f"{result['run']}, length {result['length']}", **line(i))
        bounds = [[y + sign * e for y, e in zip(loss, error, strict=True)] for sign in (-1, 1)]
        axis.fill_between(at, *bounds, color=line(i)["color"], alpha=0.2, linewidth=0)
    longest = max((r["length"] for r in shown), default=1)
    log_ticks(axis, [2**k for k in range(longest.bit_length())])
    axis.set(xlabel="tokens before the predicted one, in its window", ylabel="loss, nats a token (band: ± standard error)")
    mark_training_length(axis, {r["block_size"] for r in shown})
    axis.legend(fontsize=8)
    save(figure, path)
