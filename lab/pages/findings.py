"""docs/findings.md: its tables and figures, from results/ of the laboratory, of interventions and of tasks."""

import json
import math
from pathlib import Path
from typing import Any

from core.documents import Losses, load
from core.figures import panels, save
from core.files import ROOT
from core.sweep.report import draw_panel
from core.tables import mean_and_error, plus_minus, table
from lab.analyze import tasks
from lab.sweep_report import draw_families, render

REPLACED = {
    "shuffle": "of other tokens of the window",
    "other": "of another window",
    "mean": "its mean per head",
    "rope": "RoPE's θ₁",
}


def result(name: str) -> dict[str, Any]:
    """What is in results/NAME-cpu.json."""
    return json.loads((ROOT / f"results/{name}-cpu.json").read_text())


def render_interventions(found: dict[str, Any]) -> str:
    """A row per replacement of f, a column per encoding and length: what it adds to the loss, over the runs of the encoding."""
    at: dict[tuple[str, str, int], list[float]] = {}
    for run in found["runs"]:
        for r in run["results"]:
            at.setdefault((r["f"], run["encoding"], r["length"]), []).append(r["difference"])
    columns = list(dict.fromkeys((encoding, length) for _, encoding, length in at))
    heads = [f"{encoding}, {length}" for encoding, length in columns]
    rows = [
        [words, *(plus_minus(*mean_and_error(at[change, encoding, length]), "+.3f") for encoding, length in columns)]
        for change, words in REPLACED.items()
    ]
    n = {encoding: sum(run["encoding"] == encoding for run in found["runs"]) for encoding, _ in columns}
    text = table(["nats per token more with f", *heads], rows)
    return f"{text}\nMean ± standard error over {min(n.values())} runs each.\n"


def render_documents(losses: Losses) -> str:
    """A row per run: its perplexity at each length, and how many nats a token it is behind the first, over the same documents.

    The error is that of a ratio of sums over documents (Cochran, Sampling Techniques, 3rd ed., eq. 6.13): it says how well
    these documents stand for others, and nothing of other seeds.
    """
    heads, tokens_D = [f"{length:,}" for length in losses.lengths], losses.tokens
    n, total = len(tokens_D), tokens_D.sum()
    first, second = [], []
    for i, run in enumerate(losses.runs):
        first.append([run, *(f"{math.exp(sums_D.sum() / total):.3f}" for sums_D in losses.loss[i])])
        cells = []
        for difference_D in losses.loss[i] - losses.loss[0]:
            mean = difference_D.sum() / total
            error = math.sqrt(((difference_D - mean * tokens_D) ** 2).sum() * n / (n - 1)) / total
            cells.append(plus_minus(mean, error, "+.4f"))
        second += [[run, *cells]] if i else []
    tables = table(["perplexity", *heads], first), table([f"− {losses.runs[0]}, nats", *heads], second)
    return "\n".join([*tables, f"{n} documents, {total:,} tokens; ± is the standard error over documents.\n"])


def merge_seeds(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of an encoding as one: accuracies are means over its seeds, errors those of the means (of a single run, its own)."""
    merged = []
    for encoding in dict.fromkeys(one["encoding"] for one in found["runs"]):
        runs = [one for one in found["runs"] if one["encoding"] == encoding]
        results = []
        for same in zip(*(one["results"] for one in runs), strict=True):
            record = {key: same[0][key] for key in ("task", "factor", "chance")}
            known = [r["accuracy"] for r in same if r["accuracy"] is not None]
            accuracy, stderr = mean_and_error(known) if known else (None, None)
            results.append(record | {"accuracy": accuracy, "stderr": stderr if len(known) > 1 else same[0]["stderr"]})
        merged.append({"run": encoding, "encoding": encoding, "n": len(runs), "results": results})
    return merged


def render_tasks(found: dict[str, Any]) -> str:
    """A row per task and encoding, a column per multiple of the training length."""
    merged = merge_seeds(found)
    factors = list(dict.fromkeys(r["factor"] for r in merged[0]["results"]))
    rows = []
    for task, chance in dict.fromkeys((r["task"], r["chance"]) for r in merged[0]["results"]):
        for i, one in enumerate(merged):
            row = [r for r in one["results"] if r["task"] == task]
            cells = [plus_minus(r["accuracy"], r["stderr"], ".2f") for r in row]
            title = f"{task} (a guess: {chance:.2f})" if i == 0 else ""
            rows.append([title, one["encoding"], *cells, one["n"]])
    examples = max(r["n"] for one in found["runs"] for r in one["results"])
    text = table([f"accuracy at × {found['runs'][0]['block_size']}", "", *factors, "n"], rows)
    return f"{text}\nMean ± standard error over n runs, of a single run over its {examples} examples.\n"


def blocks() -> dict[str, str]:
    """Text for each marker of the page."""
    return {
        "lab": render(result("lab")),
        "lab-again": render(result("lab-again")),
        "lab-rotary": render(result("lab-rotary")),
        "intervene": render_interventions(result("intervene")),
        "tasks": render_tasks(result("tasks")),
        "lab-gpu": render_documents(load(ROOT / "results/lab-gpu.npz")),
    }


IN_README = ("rope", "carope", "carope_hidden", "alibi", "nope", "learned")


def draw_readme(path: Path) -> None:
    """The README's figure: the encodings that it speaks of, small on a CPU and larger on a GPU."""
    figure, axes = panels(1, 2, width=5.2, height=4.0)
    for axis, name in zip(axes.flat, ("lab-cpu", "lab-gpu"), strict=True):
        found = json.loads((ROOT / f"results/{name}.json").read_text())
        cfg, seeds = found["config"], max(r["n"] for r in found["summary"])
        draw_panel(axis, found["summary"], IN_README, {cfg["block_size"]}, None)
        size = f"{cfg['n_layer']} layers, width {cfg['n_embd']}, trained at {cfg['block_size']}"
        axis.set_title(f"{size}: {seeds} seed{'s' * (seeds > 1)}", fontsize=10)
    axes[0, 0].set_ylabel("perplexity (a token is a byte)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    save(figure, path)


def draw_figures() -> None:
    """The figures of the page, and the README's, which is of the same results."""
    draw_readme(ROOT / "docs/carope-vs-rope.png")
    draw_families(result("lab"), ROOT / "docs/lab-cpu.png")
    merged = merge_seeds(result("tasks"))
    tasks.draw(merged, list(dict.fromkeys(r["task"] for r in merged[0]["results"])), ROOT / "docs/tasks-cpu.png")
