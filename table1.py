"""Table 1: train what is missing, evaluate, and put our perplexities beside the paper's.

    python table1.py --nproc 2 --preflight           # do GPUs, data and disk bear it, and what will it cost: a few minutes
    python table1.py --dry_run                       # what is there, what is left, how long it takes
    python table1.py --nproc 2                       # the paper's eight runs on two GPUs, then the table
    python table1.py --sizes tiny --encodings rope carope_hidden --lengths 512 1024 2048 --seed=2

A run is config/SIZE.toml under config/ENCODING.toml; any --key=value goes to every run. Started again it goes on where
it was. Writes table1.md, table1.json and table1.png.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from core.config import grad_accum
from core.console import CommandLine, new_file, new_folder, quiet, remark
from core.distributed import Distributed
from core.errors import UserError, command
from core.files import ROOT, atomic_write, write_json
from core.results import Result, beside, read_results
from core.sweep.jobs import launch, start
from core.sweep.plan import Entry, check_data, find, questions, refuse_conflicts, refuse_other_code, show_plan
from core.sweep.preflight import preflight
from core.upload import upload
from eval_ppl import evaluate_run

# Perplexity on 0.1B held-out tokens of FineWeb-Edu, Table 1 of arXiv 2507.23083
PAPER = {
    ("small", 512): {"rope": 21.31, "carope": 21.23, "learned": 21.90, "sinusoidal": 22.14},
    ("small", 1024): {"rope": 56.61, "carope": 21.39, "sinusoidal": 166.18},
    ("tiny", 512): {"rope": 29.33, "carope": 28.99, "learned": 30.48, "sinusoidal": 30.62},
    ("tiny", 1024): {"rope": 81.27, "carope": 36.74, "sinusoidal": 223.28},
}


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the configuration."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["tiny", "small"], help="files in config/ [default: tiny small]")
    add(
        "--encodings",
        nargs="+",
        default=["rope", "carope", "learned", "sinusoidal"],
        help="files in config/, or encodings of a --plugin [default: the paper's four]",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[512, 1024],
        metavar="T",
        help="evaluation lengths, tokens [default: 512 1024]",
    )
    add("--max_tokens", "--max-tokens", type=int, default=0, help="evaluate the first so many tokens only [default: all]")
    add("--nproc", type=int, default=0, help="processes on this node [default: one, which uses one device]")
    add("--out", type=new_folder, default=None, help="folder of table1.* [default: the runs' out_dir]")
    add("--dry_run", "--dry-run", action="store_true", help="show the plan and leave")
    add(
        "--preflight",
        action="store_true",
        help="try a few steps of each run, the exchange between ranks, data, disk and a checkpoint, say the cost and leave",
    )
    add("--json", type=new_file, metavar="FILE", help="with --preflight: also write its figures there")
    args, rest = parser.parse_known_args()
    if args.json and not args.preflight:
        raise UserError("--json: goes with --preflight; the table's figures are in table1.json")
    return args, [word for word in rest if word != "--"]


def plan(sizes: list[str], encodings: list[str], overrides: list[str]) -> list[Entry]:
    """An entry per size and encoding. Raises UserError for a configuration that cannot be."""
    if any(word.partition("=")[0] == "--name" for word in overrides):
        raise UserError("--name: table1.py names its runs SIZE-ENCODING[-sSEED]; --out_dir keeps sets of runs apart")
    return [find(ROOT / f"config/{size}.toml", encoding, overrides) for size in sizes for encoding in encodings]


def try_out(entries: list[Entry], args: argparse.Namespace, overrides: list[str]) -> int:
    """The preflight, on the ranks that torchrun has started or on --nproc of its own; returns the exit code."""
    if args.nproc and "WORLD_SIZE" in os.environ:
        raise UserError(f"--nproc {args.nproc}: torchrun has started the processes already; leave one of them out")
    if args.nproc:
        for entry in entries:
            grad_accum(entry.cfg, args.nproc)  # refuses what they cannot share before they are started
        words = ["--preflight", "--sizes", *args.sizes, "--encodings", *args.encodings, *overrides]
        words += ["--json", args.json] if args.json else []
        return start("table1.py", words, args.nproc)
    preflight(entries, args.json)
    return 0


def train_and_evaluate(entry: Entry, args: argparse.Namespace) -> list[Result]:
    """Finish the run and its evaluation, where they are not; returns one result per length."""
    if not entry.finished:
        launch("train.py", entry.words, args.nproc)
    path, asked = entry.cfg.folder / "eval.json", questions(entry, args.lengths, args.max_tokens)
    there = read_results(path)
    if missing := [q.length for q in asked if not q.answer(there)]:
        check_data(entry, asked[0])
        evaluate_entry(entry, missing, args, path)
        there = read_results(path)
    results = [answer for q in asked if (answer := q.answer(there))]
    if len(results) < len(asked):
        raise UserError(f"{path}: has no result of the run's last weights; was it trained again meanwhile? Start again")
    if missing and entry.cfg.wandb != "disabled":
        share(entry.cfg.folder, results)
    about = {"size": entry.size, "variant": entry.variant, "seed": entry.cfg.seed}
    return [{**about, **r, "paper": PAPER.get((entry.size, r["length"]), {}).get(entry.variant)} for r in results]


def evaluate_entry(entry: Entry, lengths: list[int], args: argparse.Namespace, path: Path) -> None:
    """Add the perplexities of a finished run at `lengths` to those in `path`; evaluated here, or on --nproc processes."""
    if args.nproc:
        words = ["--lengths", *map(str, lengths), "--max_tokens", str(args.max_tokens), "--json", str(path), "--append"]
        launch(
            "eval_ppl.py", [str(entry.cfg.folder), *words, "--data", entry.cfg.data, "--device", entry.cfg.device], args.nproc
        )
        return
    with Distributed.start(entry.cfg.device) as dist:
        results = evaluate_run(entry.cfg.folder, lengths, dist, max_tokens=args.max_tokens, data=entry.cfg.data)
    write_json(path, beside(results, read_results(path)))
    found = ", ".join(f"{r['perplexity']:.2f} at length {r['length']}" for r in results if r["perplexity"])
    print(f"{entry.cfg.name}: ppl {found or '–'}; {max(r['tokens'] or 0 for r in results):,} tokens", flush=True)


def share(folder: Path, results: list[dict[str, Any]]) -> None:
    """Put the results of the run in `folder` into its run at Weights & Biases; the table does without where that fails."""
    try:
        upload(folder, results)
    except UserError as error:
        print(f"warning: {error}; eval_ppl.py {folder} --wandb uploads its perplexities", file=sys.stderr)


def render(results: list[dict[str, Any]]) -> str:
    """Markdown: a table per size, a row per length and source, a column per encoding."""
    parts = []
    for size in dict.fromkeys(r["size"] for r in results):
        mine = [r for r in results if r["size"] == size]
        variants = list(dict.fromkeys(r["variant"] for r in mine))
        lines = [f"| {size}, length | | {' | '.join(variants)} |", "|---:|---|" + "---:|" * len(variants)]
        for length in dict.fromkeys(r["length"] for r in mine):
            row = {r["variant"]: r for r in mine if r["length"] == length}
            sources = [("ours", "perplexity")] + ([("paper", "paper")] if (size, length) in PAPER else [])
            for source, key in sources:
                cells = ["–" if row[v][key] is None else f"{row[v][key]:.2f}" for v in variants]
                lines.append(f"| {length} | {source} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    tokens = max((r["tokens"] or 0 for r in results), default=0)
    parts.append(f"Perplexity over {tokens:,} tokens of the evaluation set, one run each.\n")
    return "\n".join(parts)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against length, a panel per size, a line per encoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    sizes = list(dict.fromkeys(r["size"] for r in results))
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4.2), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        mine = [r for r in results if r["size"] == size]
        for variant in dict.fromkeys(r["variant"] for r in mine):
            points = [(r["length"], r["perplexity"]) for r in mine if r["variant"] == variant and r["perplexity"]]
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        lengths = sorted({r["length"] for r in mine})
        axis.set(xscale="log", yscale="log", title=f"GPT-{size}", xlabel="length, tokens", ylabel="perplexity", xticks=lengths)
        axis.set_xticklabels(lengths)
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)


@command(work_in_files=True)
def main() -> int:
    """Show the plan; unless it is a dry run or a preflight, do what is left of it and render the table."""
    args, overrides = parse_args()
    entries = plan(args.sizes, args.encodings, overrides)
    if args.dry_run or not (quiet() or args.preflight):
        show_plan(entries, args.nproc)
    if args.dry_run:
        return 0
    refuse_conflicts(entries)
    refuse_other_code([entry for entry in entries if not entry.finished], entries)
    if args.preflight:
        return try_out(entries, args, overrides)
    results = []
    out = Path(args.out or entries[0].cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(entries, start=1):
        if not entry.finished:
            remark(
                f"\n[{number}/{len(entries)}] {entry.cfg.name}: {entry.cfg.steps:,} steps, then its perplexities", stdout=True
            )
        results += train_and_evaluate(entry, args)
        write_json(out / "table1.json", results)
    with atomic_write(out / "table1.md", "w") as file:
        file.write(render(results))
    draw(results, out / "table1.png")
    print(f"\n{render(results)}\n{out}/table1.md, table1.json, table1.png")
    return 0


if __name__ == "__main__":
    main()
