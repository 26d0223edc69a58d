"""Table 1: train what is missing, evaluate, and put our perplexities beside the paper's.

    python table1.py --nproc 2 --preflight           # do GPUs, data and disk bear it, and what will it cost: a few minutes
    python table1.py --dry_run                       # what is there, what is left, how long it takes
    python table1.py --nproc 2                       # the paper's eight runs on two GPUs, then the table
    python table1.py --sizes tiny --encodings rope carope_hidden --seeds 1 2 3 --lengths 512 1024 2048 --jobs 2

A run is config/SIZE.toml under config/ENCODING.toml; any --key=value goes to every run. Several at a time (--jobs) have GPUs of
their own. Started again, it continues. Writes table1.md, table1.json and table1.png.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from core.config import grad_accum
from core.console import CommandLine, new_file, new_folder, quiet
from core.errors import EXIT_REQUEUE, UserError, command
from core.files import atomic_write, write_json
from core.results import Result
from core.sweep.jobs import start
from core.sweep.plan import Entry, plan, refuse_conflicts, refuse_other_code, show_plan
from core.sweep.preflight import preflight
from core.sweep.report import Record, differences, draw, lengths_of, summarize
from core.sweep.sweep import Found, add_options, check_options, run_left
from core.tables import plus_minus, table

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
    add_options(parser, "the paper's four", "the configuration's", "512 1024", "0")
    parser.set_defaults(encodings=["rope", "carope", "learned", "sinusoidal"], lengths=[512, 1024], seeds=[])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["tiny", "small"], metavar="SIZE", help="names, or config files [default: tiny small]")
    add("--out", type=new_folder, default=None, help="folder of table1.* [default: the runs' out_dir]")
    add(
        "--preflight",
        action="store_true",
        help="try a few steps of each run, the exchange between ranks, data, disk and a checkpoint, say the cost and leave",
    )
    add("--json", type=new_file, metavar="FILE", help="with --preflight: also write its figures there")
    args, rest = parser.parse_known_args()
    check_options(args)
    if args.json and not args.preflight:
        raise UserError("--json: goes with --preflight; the table's figures are in table1.json")
    return args, [word for word in rest if word != "--"]


def try_out(entries: list[Entry], args: argparse.Namespace, overrides: list[str]) -> int:
    """The preflight, on the ranks that torchrun has started or on --nproc of its own; returns the exit code."""
    if args.nproc and "WORLD_SIZE" in os.environ:
        raise UserError(f"--nproc {args.nproc}: torchrun has started the processes already; leave one of them out")
    if args.nproc:
        for entry in entries:
            grad_accum(entry.cfg, args.nproc)  # refuses what they cannot share before they are started
        words = ["--preflight", "--sizes", *args.sizes, "--encodings", *args.encodings, *overrides]
        words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
        words += ["--json", args.json] if args.json else []
        return start("table1.py", words, args.nproc)
    preflight(entries, args.json)
    return 0


def records(entry: Entry, results: Sequence[Result]) -> list[Record]:
    """A record of the finished run for each length, beside the paper's perplexity, where it has one."""
    about = {"size": entry.size, "variant": entry.variant, "seed": entry.cfg.seed}
    return [{**about, **r, "paper": PAPER.get((entry.size, r["length"]), {}).get(entry.variant)} for r in results]


def by_size(results: Sequence[Result]) -> dict[str, list[Record]]:
    """Of each size its runs' means over seeds, the first variant as the baseline."""
    runs: dict[str, list[Record]] = {}
    for r in results:
        runs.setdefault(r["size"], []).append(r | {"encoding": r["variant"]})
    return {size: summarize(mine, mine[0]["encoding"]) for size, mine in runs.items()}


def render(results: Sequence[Result]) -> str:
    """Markdown: a table per size, a row per length and source, a column per encoding; of more seeds their differences, too."""
    parts, n_seeds = [], {1}
    for size, summary in by_size(results).items():
        variants, rows = list(dict.fromkeys(r["encoding"] for r in summary)), []
        for length in lengths_of(summary):
            row = {r["encoding"]: r for r in summary if r["length"] == length}
            ours = (row.get(variant, {}) for variant in variants)
            cells = [plus_minus(r.get("perplexity"), r.get("perplexity_stderr"), ".2f") for r in ours]
            rows.append([length, "ours", *cells])
            if paper := PAPER.get((size, length)):
                rows.append([length, "paper", *(plus_minus(paper.get(variant), None, ".2f") for variant in variants)])
        parts.append(table([f"{size}, length", "", *variants], rows))
        n_seeds |= {r["n"] for r in summary}
        if max(r["n"] for r in summary) > 1 and len(variants) > 1:
            parts.append(differences(summary, variants[0]))
    tokens, most = max((r["tokens"] or 0 for r in results), default=0), max(n_seeds)
    what = "one run each" if most == 1 else f"mean ± standard error over up to {most} seeds"
    parts.append(f"Perplexity over {tokens:,} tokens of the evaluation set, {what}.\n")
    return "\n".join(parts)


@command(work_in_files=True)
def main() -> int:
    """Show the plan; unless it is a dry run or a preflight, do what is left of it and render the table."""
    args, overrides = parse_args()
    entries = plan(args.sizes, args.encodings, args.seeds, overrides)
    if args.dry_run or not (quiet() or args.preflight):
        show_plan(entries, args.nproc)
    if args.dry_run:
        return 0
    refuse_conflicts(entries)
    refuse_other_code([entry for entry in entries if not entry.finished], entries)
    if args.preflight:
        return try_out(entries, args, overrides)
    out = Path(args.out or entries[0].cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)

    def report(results: Found) -> list[Record]:
        found = [record for entry in entries for record in records(entry, results.get(entry, []))]
        write_json(out / "table1.json", found)
        if found:
            with atomic_write(out / "table1.md", "w") as file:
                file.write(render(found))
            summaries = {f"GPT-{size}": summary for size, summary in by_size(found).items()}
            draw(summaries, {entry.cfg.block_size for entry in entries}, out / "table1.png")
        return found

    results = run_left(entries, len(entries), args, report)
    if found := report(results):
        print(f"\n{render(found)}\n{out}/table1.md, table1.json, table1.png")
    if left := len(entries) - len(results):
        print(f"time is up with {left} of {len(entries)} runs left; the same command goes on")
    return EXIT_REQUEUE if left else 0


if __name__ == "__main__":
    main()
