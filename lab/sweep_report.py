"""What a grid of runs says: means over seeds, differences to the baseline within a seed, a table and a figure.

python -m lab.sweep_report    puts results/lab-cpu.json, intervene-cpu.json, lab-gpu.npz into docs/findings.md
"""

import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.config import FREE_ON_RESUME, Config, load_config
from core.data import TokenStream
from core.distributed import format_name, pick_device, pick_dtype
from core.documents import Losses, load
from core.errors import UserError
from core.files import ROOT, atomic_write, write_blocks
from core.fingerprint import source_of
from core.provenance import git_version
from core.results import FIELDS
from core.sweep.plan import Entry
from positional import ENCODINGS

STYLES = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"), ("X", "-.")]  # tell lines apart in grey
KEPT = (  # of an evaluation's record
    "perplexity", "nll", "stderr", "bits_per_byte", "tokens", "documents", "bytes", "step", "n_params", "git", "probe", *FIELDS,
)  # fmt: skip


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; of a single value the error is unknown."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def collect(cfg: Config, baseline: str, finished: dict[Entry, list[dict[str, Any]]], known: dict[str, Any]) -> dict[str, Any]:
    """All that is finished: `runs`, a record per run and length; `summary`, one per encoding and length; provenance.

    `finished` are evaluations by their run, `known` an earlier report, whose runs stay. In the summary `perplexity` and `nll`
    (nats) are means over `n` seeds, `…_stderr` their standard errors. `nll_difference` is to the `baseline` encoding, with the
    same seed. Lengths without positions have null for all.
    """
    runs = {(r["encoding"], r["seed"], r["length"]): r for r in known.get("runs", [])}
    for entry, results in finished.items():
        for result in results:
            about = {"encoding": entry.variant, "seed": entry.cfg.seed, "options": entry.cfg.own_options}
            mine = about | {key: result[key] for key in KEPT if key in result}
            runs[entry.variant, entry.cfg.seed, result["length"]] = mine
    return {
        "baseline": baseline,
        "config": common(cfg),
        "train_tokens": cfg.steps * cfg.tokens_per_step,
        "machine": list(dict.fromkeys([*known.get("machine", []), *machine(list(finished))])),
        "git": git_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "summary": summarize(list(runs.values()), baseline),
        "runs": list(runs.values()),
    }


def common(cfg: Config) -> dict[str, Any]:
    """What all runs of a laboratory have in common."""
    return cfg.model_dump(exclude={"name", "seed", "encoding", *cfg.own_options})


def read_report(path: Path) -> dict[str, Any]:
    """A report that is there, {} where none is. Raises UserError where the file is something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if isinstance(found["runs"], list) and isinstance(found["config"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: not a report of lab.sweep; move it away, or --json says where this one goes")


def refuse_other(known: dict[str, Any], cfg: Config, args: Any, path: Path, more: bool) -> None:
    """Raise UserError where the report at `path` is of other runs, or of other evaluations, than this command's.

    `more`: whether runs are to come, which must be on the same evaluation set and in the same number format too.
    """
    now = common(cfg)
    differing = [
        f"{key} = {known['config'][key]!r} (now {now[key]!r})"
        for key in now
        if key not in FREE_ON_RESUME and known.get("config", {}).get(key, now[key]) != now[key]
    ]
    wanted: dict[str, Any] = {"max_tokens": args.max_tokens, "min_document_tokens": args.documents or None}
    if known and more:
        wanted["dtype"] = format_name(pick_dtype(cfg.dtype, pick_device(cfg.device)))
        wanted["data_sha256"] = TokenStream(cfg.data, "val", cfg.vocab_size).sha256()
    for key, value in wanted.items():
        if others := [r[key] for r in known.get("runs", []) if key in r and r[key] != value]:
            differing.append(f"{key} = {others[0]!r} (now {value!r})")
    if differing:
        raise UserError(f"{path}: holds results with {', '.join(differing)}; --json says where these go, or move it away")


def machine(entries: Sequence[Entry]) -> list[str]:
    """The devices that the runs name in their env.json."""
    found = {}
    for entry in entries:
        path = entry.cfg.folder / "env.json"
        if path.exists():
            starts = json.loads(path.read_text())
            for start in starts if isinstance(starts, list) else [starts]:
                found[f"{start['world_size']} × {start['device']}, {start['threads']} threads"] = True
    return list(found)


def summarize(runs: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One record per encoding and length, over the seeds there are."""
    at = {(r["encoding"], r["length"], r["seed"]): r for r in runs}
    summary = []
    for encoding, length in dict.fromkeys((r["encoding"], r["length"]) for r in runs):
        mine = [r for (e, n, _), r in at.items() if (e, n) == (encoding, length) and r["nll"] is not None]
        record: dict[str, Any] = {"encoding": encoding, "length": length, "n": len(mine)}
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


def render(found: dict[str, Any]) -> str:
    """Two Markdown tables, a row per encoding, a column per length: perplexity, and the difference to the baseline."""
    lengths = list(dict.fromkeys(r["length"] for r in found["summary"]))
    parts, before = [], outdated(found["runs"])
    for title, key, digits in (
        ("perplexity", "perplexity", 2),
        (f"nats per token more than {found['baseline']}, same seed", "nll_difference", 4),
    ):
        lines = [f"| {title} | {' | '.join(map(str, lengths))} | n |", "|---|" + "---:|" * (len(lengths) + 1)]
        for encoding in dict.fromkeys(r["encoding"] for r in found["summary"]):
            row = {r["length"]: r for r in found["summary"] if r["encoding"] == encoding}
            cells = [cell(row[n], key, digits) if n in row else "–" for n in lengths]
            if key == "nll_difference" and encoding == found["baseline"]:
                continue
            name = encoding + " †" * (encoding in before)
            lines.append(f"| {name} | {' | '.join(cells)} | {max(r['n'] for r in row.values())} |")
        parts.append("\n".join(lines) + "\n")
    tokens = max((r["tokens"] or 0 for r in found["runs"]), default=0)
    parts.append(
        f"Mean ± standard error over n seeds; {found['train_tokens']:,} training tokens at length "
        f"{found['config']['block_size']}, evaluated on the same {tokens:,} tokens at every length.\n"
    )
    if before:
        parts.append("† by code of the encoding that has changed since: another run may give other numbers.\n")
    return "\n".join(parts)


def cell(record: dict[str, Any], key: str, digits: int) -> str:
    """Mean ± standard error."""
    if record[key] is None:
        return "–"
    sign = "+" if key == "nll_difference" else ""
    error = record[f"{key}_stderr"]
    return f"{record[key]:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity against length, a panel per family, the baseline in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    families: dict[str, list[str]] = {}
    for encoding in dict.fromkeys(r["encoding"] for r in found["summary"]):
        families.setdefault(family(encoding), []).append(encoding)
    families = {title: names for title, names in families.items() if names != [found["baseline"]]} or families
    lengths = sorted({r["length"] for r in found["summary"]})
    columns = 2 if len(families) in (2, 4) else min(3, len(families))
    rows = math.ceil(len(families) / columns)
    size = (4.2 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    for axis, (title, encodings) in zip(axes.flat, families.items(), strict=False):
        for i, encoding in enumerate(dict.fromkeys([found["baseline"], *encodings])):
            points = [r for r in found["summary"] if r["encoding"] == encoding and r["perplexity"]]
            marker, line = STYLES[i % len(STYLES)]
            base = encoding == found["baseline"]
            axis.errorbar(
                [r["length"] for r in points],
                [r["perplexity"] for r in points],
                [r["perplexity_stderr"] or 0 for r in points],
                marker=marker, linestyle=line, capsize=2, markersize=4, color="0.6" if base else None,
                linewidth=3 if base else 1.4, zorder=1 if base else 2, label=f"{encoding} (baseline)" if base else encoding,
            )  # fmt: skip
        axis.axvline(found["config"]["block_size"], color="0.8", linestyle=":", zorder=0)
        axis.set(xscale="log", yscale="log", title=title, xticks=lengths)
        axis.set_xticklabels(lengths)
        axis.xaxis.minorticks_off()
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel(f"length, tokens (trained at {found['config']['block_size']})")
    for axis in axes[:, 0]:
        axis.set_ylabel("perplexity")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)


def encoding_of(variant: str) -> str | None:
    """The encoding of the configuration config/VARIANT.toml; None where that is no longer there."""
    if variant in ENCODINGS:
        return variant
    try:
        return load_config([str(ROOT / f"config/{variant}.toml")]).encoding
    except UserError:
        return None


def family(variant: str) -> str:
    """The family of the encoding of a configuration."""
    encoding = encoding_of(variant)
    return ENCODINGS[encoding].family if encoding else "other"


def outdated(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The variants with a run of an encoding's earlier code; an early report does not say which code it was."""
    said = dict.fromkeys((r["encoding"], r["source"]) for r in runs if r.get("source"))
    return [variant for variant, source in said if not (now := encoding_of(variant)) or source_of(now) != source]


PAGE = ROOT / "docs/findings.md"


def render_interventions(found: dict[str, Any]) -> str:
    """A row per replacement of f, a column per encoding and length: what it adds to the loss, over the runs of the encoding."""
    at: dict[tuple[str, str, int], list[float]] = {}
    for run in found["runs"]:
        for r in run["results"]:
            at.setdefault((r["f"], run["encoding"], r["length"]), []).append(r["difference"])
    columns = list(dict.fromkeys((encoding, length) for _, encoding, length in at))
    heads = [f"{encoding}, {length}" for encoding, length in columns]
    lines = [f"| nats per token more with f | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for change, words in REPLACED.items():
        cells = []
        for encoding, length in columns:
            mean, error = mean_and_error(at[change, encoding, length])
            cells.append(f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}"))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    n = {encoding: sum(run["encoding"] == encoding for run in found["runs"]) for encoding, _ in columns}
    return "\n".join(lines) + f"\n\nMean ± standard error over {min(n.values())} runs each.\n"


def render_documents(losses: Losses) -> str:
    """A row per run: its perplexity at each length, and how many nats a token it is behind the first, over the same documents.

    The error is that of a ratio of sums over documents (Cochran, Sampling Techniques, 3rd ed., eq. 6.13): it says how well
    these documents stand for others, and nothing of other seeds.
    """
    heads, tokens_D = [f"{length:,}" for length in losses.lengths], losses.tokens
    n, total = len(tokens_D), tokens_D.sum()
    rule = "|---|" + "---:|" * len(heads)
    first, second = (
        [f"| perplexity | {' | '.join(heads)} |", rule],
        [f"| − {losses.runs[0]}, nats | {' | '.join(heads)} |", rule],
    )
    for i, run in enumerate(losses.runs):
        cells = [f"{math.exp(sums_D.sum() / total):.3f}" for sums_D in losses.loss[i]]
        first.append(f"| {run} | {' | '.join(cells)} |")
        cells = []
        for difference_D in losses.loss[i] - losses.loss[0]:
            mean = difference_D.sum() / total
            error = math.sqrt(((difference_D - mean * tokens_D) ** 2).sum() * n / (n - 1)) / total
            cells.append(f"{mean:+.4f} ± {error:.4f}")
        second += [f"| {run} | {' | '.join(cells)} |"] if i else []
    return "\n".join([*first, "", *second]) + f"\n\n{n} documents, {total:,} tokens; ± is the standard error over documents.\n"


REPLACED = {
    "shuffle": "of other tokens of the window",
    "other": "of another window",
    "mean": "its mean per head",
    "rope": "RoPE's θ₁",
}


def blocks() -> dict[str, str]:
    """Text for each marker of the page."""
    lab, again, interventions = (
        json.loads((ROOT / f"results/{name}-cpu.json").read_text()) for name in ("lab", "lab-again", "intervene")
    )
    gpu = render_documents(load(ROOT / "results/lab-gpu.npz"))
    return {"lab": render(lab), "lab-again": render(again), "intervene": render_interventions(interventions), "lab-gpu": gpu}


def write_page() -> None:
    """Put the tables into docs/findings.md, and the laboratory's figure beside the page."""
    write_blocks(PAGE, blocks())
    draw(json.loads((ROOT / "results/lab-cpu.json").read_text()), PAGE.parent / "lab-cpu.png")


if __name__ == "__main__":
    write_page()
