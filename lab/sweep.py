"""Compare positional encodings: a grid of encodings × seeds, evaluated at several lengths, mean ± standard error.

    python -m lab.sweep --dry_run                 # what is there, what is left
    python -m lab.sweep --jobs 2                  # config/lab.toml on two CPU cores: two runs at a time, a core each
    python -m lab.sweep config/tiny.toml --encodings rope carope --lengths 512 1024 2048 --minutes 9 --steps=400

It is table1.py's sweep of one size, whose report outlives the run folders: the same command
continues after an interruption or after --minutes: it uses the run folders that exist, and keeps results that its JSON already
has, even if their run folders are gone. The seed decides the initial weights; all runs read the same tokens in the same order,
so differences to the baseline (the first encoding) are taken seed by seed. It writes lab.json, lab.md and lab.png, and with
--documents the loss of each document, lab.npz (core/documents.py).
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.console import CommandLine, given_path, new_file, quiet, remark
from core.documents import load, merge
from core.errors import EXIT_REQUEUE, UserError, at_least, command
from core.files import atomic_write, write_json
from core.fingerprint import source_of
from core.sweep.plan import Entry, plan, refuse_conflicts, refuse_other_code, show_plan
from core.sweep.sweep import LOSSES, Found, add_options, check_options, run_left
from lab.sweep_report import collect, draw_families, read_report, refuse_other, render
from positional import ENCODINGS


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the configuration."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("base", type=given_path, nargs="?", default="config/lab.toml", metavar="CONFIG.toml", help="[default: config/lab.toml]")
    add_options(parser, "all that there are, after rope", "1 2 3", "1, 2, 4 and 8 training lengths", "65,536")
    parser.set_defaults(seeds=[1, 2, 3], max_tokens=65_536)
    add(
        "--documents",
        type=int,
        default=0,
        metavar="N",
        help="evaluate documents of at least N tokens, each by itself [default: 0, no]",
    )
    what = "[default: lab.json beside the runs]; lab.md and lab.png go beside it, named alike"
    add("--json", type=new_file, metavar="FILE", help=what)
    args, rest = parser.parse_known_args()
    args.encodings = args.encodings or sorted(ENCODINGS, key=lambda name: name != "rope")  # by now with those of plugins
    check_options(args)
    at_least(0, documents=args.documents)
    if args.json and Path(args.json).suffix in (".md", ".png", ".npz"):
        raise UserError(f"--json {args.json}: is the name of what goes beside it; give a file that ends in .json")
    return args, [word for word in rest if word != "--"]


def answered(entry: Entry, lengths: list[int], known: dict[str, Any]) -> bool:
    """Whether the report `known` has the run at all lengths, by the encoding's code as it is; an early report does not say."""
    now = source_of(entry.cfg.encoding)
    mine = [r for r in known.get("runs", []) if (r["encoding"], r["seed"]) == (entry.variant, entry.cfg.seed)]
    return set(lengths) <= {r["length"] for r in mine if r.get("source", now) == now}


def report(baseline: Entry, results: Found, args: argparse.Namespace, out: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Write JSON, Markdown, figure and losses of documents: the earlier report `known`, and the `results` since.

    Returns what went into the JSON.
    """
    found = collect(baseline.cfg, baseline.variant, results, known)
    write_json(out, found)
    with atomic_write(out.with_suffix(".md"), "w") as file:
        file.write(render(found))
    if found["summary"]:
        draw_families(found, out.with_suffix(".png"))
    if args.documents:
        keep_losses([entry.cfg.folder / LOSSES for entry in results], out.with_suffix(".npz"))
    return found


def keep_losses(paths: Iterable[Path], out: Path) -> None:
    """Put the documents' losses of those runs that have them into `out`, beside those of others that are there."""
    mine = [load(path) for path in paths if path.exists()]
    there = load(out).without([one.runs[0] for one in mine]) if mine and out.exists() else None
    if mine:
        merge([*([there] if there else []), *mine]).save(out)


@command(work_in_files=True)
def main() -> int:
    """Show the plan; unless it is a dry run, do what is left of it, as far as --minutes go, and report."""
    args, overrides = parse_args()
    entries = plan([args.base], args.encodings, args.seeds, overrides)
    args.lengths = args.lengths or [entries[0].cfg.block_size * n for n in (1, 2, 4, 8)]
    if args.dry_run or not quiet():
        show_plan(entries, args.nproc)
    if args.dry_run:
        return 0
    refuse_conflicts(entries)
    out = Path(args.json or Path(entries[0].cfg.out_dir) / "lab.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    known = read_report(out)
    left = [e for e in entries if not answered(e, args.lengths, known)]
    refuse_other(known, (left or entries)[0].cfg, args, out, more=bool(left))
    refuse_other_code(left, entries, known.get("runs", []))
    if len(left) < len(entries):
        remark(f"{out} has {len(entries) - len(left)} of the {len(entries)} runs already", stdout=True)

    def write(results: Found) -> dict[str, Any]:
        return report(entries[0], results, args, out, known)

    results = run_left(left, len(entries), args, write)
    print(f"\n{render(write(results))}\n{out}, {out.with_suffix('.md')}, {out.with_suffix('.png')}")
    if undone := len(left) - len(results):
        print(f"time is up with {undone} of {len(entries)} runs left; the same command goes on")
    return EXIT_REQUEUE if undone else 0


if __name__ == "__main__":
    main()
