"""What a set of runs says: means over seeds, differences to the baseline within a seed, tables and a figure.

A run's record has `encoding` (the variant), `seed`, `length`, `nll` (nats) and `perplexity`, both null where the encoding has
no such positions.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.figures import line, log_ticks, mark_training_length, panels, plain_log_y, save
from core.tables import mean_and_error, plus_minus, table

Record = dict[str, Any]


def summarize(runs: Sequence[Record], baseline: str) -> list[Record]:
    """One record per encoding and length, over the seeds there are.

    `perplexity` and `nll` are means over `n` seeds, `…_stderr` their standard errors; `nll_difference` is to the `baseline`
    with the same seed. Lengths without positions have null for all.
    """
    at = {(r["encoding"], r["length"], r["seed"]): r for r in runs}
    summary = []
    for encoding, length in dict.fromkeys((r["encoding"], r["length"]) for r in runs):
        mine = [r for (e, n, _), r in at.items() if (e, n) == (encoding, length) and r["nll"] is not None]
        record: Record = {"encoding": encoding, "length": length, "n": len(mine)}
        pairs = [r["nll"] - other["nll"] for r in mine if (other := at.get((baseline, length, r["seed"]))) and other["nll"]]
        columns = {
            "perplexity": [r["perplexity"] for r in mine],
            "nll": [r["nll"] for r in mine],
            "nll_difference": pairs,
        }
        for key, values in columns.items():
            record[key], record[f"{key}_stderr"] = mean_and_error(values) if values else (None, None)
        summary.append(record)
    return summary


def lengths_of(summary: Sequence[Record]) -> list[int]:
    """The lengths, in the order in which they come."""
    return list(dict.fromkeys(r["length"] for r in summary))


def perplexities(summary: Sequence[Record], marked: Sequence[str] = ()) -> str:
    """A row per encoding, a column per length; † behind those that are `marked`."""
    return _by_length("perplexity", summary, "perplexity", ".2f", marked)


def differences(summary: Sequence[Record], baseline: str, marked: Sequence[str] = ()) -> str:
    """Nats per token that each other encoding is behind the baseline with the same seed."""
    others = [r for r in summary if r["encoding"] != baseline]
    return _by_length(f"nats per token more than {baseline}, same seed", others, "nll_difference", "+.4f", marked)


def _by_length(title: str, summary: Sequence[Record], key: str, form: str, marked: Sequence[str]) -> str:
    lengths, rows = lengths_of(summary), []
    for encoding in dict.fromkeys(r["encoding"] for r in summary):
        row = {r["length"]: r for r in summary if r["encoding"] == encoding}
        cells = [plus_minus(row[n][key], row[n][f"{key}_stderr"], form) if n in row else "–" for n in lengths]
        rows.append([encoding + " †" * (encoding in marked), *cells, max(r["n"] for r in row.values())])
    return table([title, *lengths, "n"], rows)


def draw(groups: Mapping[str, Sequence[Record]], trained_at: set[int], path: Path, baseline: str | None = None) -> None:
    """Perplexity against length, a panel per group of summary records, a line per encoding; the baseline is named as such."""
    columns = 2 if len(groups) in (2, 4) else min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, axes = panels(rows, columns, width=4.6, height=3.6, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (title, group) in zip(axes.flat, groups.items(), strict=False):
        draw_panel(axis, group, list(dict.fromkeys(r["encoding"] for r in group)), trained_at, baseline)
        axis.set_title(title)
        axis.legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("perplexity")
    save(figure, path)


def draw_panel(axis: Any, summary: Sequence[Record], shown: Sequence[str], trained_at: set[int], baseline: str | None) -> None:
    """Perplexity against length, a line for each encoding of `shown` that the summary has; its place there is its style."""
    for i, encoding in enumerate(shown):
        points = [r for r in summary if r["encoding"] == encoding and r["perplexity"]]
        if points:
            axis.errorbar(
                [r["length"] for r in points], [r["perplexity"] for r in points],
                [r["perplexity_stderr"] or 0 for r in points], capsize=2,
                label=f"{encoding} (baseline)" if encoding == baseline else encoding, **line(i),
            )  # fmt: skip
    log_ticks(axis, sorted(lengths_of(summary)))
    plain_log_y(axis)
    mark_training_length(axis, trained_at)
    axis.set_xlabel("length, tokens")
