"""Compare positional encodings: a grid of encodings × seeds, evaluated at several lengths, mean ± standard error.

    python -m lab.sweep --dry_run                 # what is there, what is left
    python -m lab.sweep --jobs 2                  # config/lab.toml on two CPU cores: two runs at a time, a core each
    python -m lab.sweep config/tiny.toml --encodings rope carope --lengths 512 1024 2048 --minutes 9 --steps=400

A run is the base configuration under config/ENCODING.toml with a seed; any --key=value applies to every run. The same command
continues after an interruption or after --minutes: it uses the run folders that exist, and keeps results that its JSON already
has, even if their run folders are gone. The seed decides the initial weights; all runs read the same tokens in the same order,
so differences to the baseline (the first encoding) are taken seed by seed. It writes lab.json, lab.md and lab.png, and with
--documents the loss of each document, lab.npz (core/documents.py).
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.console import CommandLine, given_path, new_file, quiet, remark
from core.documents import load, merge
from core.errors import EXIT_REQUEUE, UserError, at_least, command
from core.files import atomic_write, sha256_file, write_json
from core.fingerprint import source_of
from core.results import Question, Result, read_results
from core.sweep.jobs import Job, run_all
from core.sweep.plan import Entry, check_data, find, questions, refuse_conflicts, refuse_other_code, show_plan
from lab.sweep_report import collect, draw, read_report, refuse_other, render
from positional import ENCODINGS

LOSSES = "losses.npz"  # in a run's folder


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the configuration."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("base", type=given_path, nargs="?", default="config/lab.toml", metavar="CONFIG.toml", help="[default: config/lab.toml]")
    add(
        "--encodings",
        nargs="+",
        help="files in config/ or a --plugin's, the baseline first [default: all that there are, after rope]",
    )
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="[default: 1 2 3]")
    add("--lengths", nargs="+", type=int, metavar="T", help="evaluation lengths [default: 1, 2, 4 and 8 training lengths]")
    add("--max_tokens", "--max-tokens", type=int, default=65_536, help="tokens of an evaluation, 0 is all [default: 65,536]")
    add(
        "--documents",
        type=int,
        default=0,
        metavar="N",
        help="evaluate documents of at least N tokens, each by itself [default: 0, no]",
    )
    add("--jobs", type=int, default=1, help="runs at a time; on a CPU they share its cores [default: 1]")
    add("--stagger", type=float, default=0, metavar="S", help="seconds between the starts of two runs [default: 0]")
    add("--minutes", type=float, default=0, help="stop after so long, in order; 0 is never [default: 0]")
    add(
        "--json",
        type=new_file,
        metavar="FILE",
        help="[default: lab.json beside the runs]; lab.md and lab.png go beside it, named alike",
    )
    add("--dry_run", "--dry-run", action="store_true", help="show the plan and leave")
    args, rest = parser.parse_known_args()
    args.encodings = args.encodings or sorted(ENCODINGS, key=lambda name: name != "rope")  # by now with those of plugins
    at_least(1, jobs=args.jobs, lengths=args.lengths)
    numbers = {"max_tokens": args.max_tokens, "documents": args.documents, "seeds": args.seeds}
    at_least(0, minutes=args.minutes, stagger=args.stagger, **numbers)
    return args, [word for word in rest if word != "--"]


def plan(args: argparse.Namespace, overrides: list[str]) -> list[Entry]:
    """An entry per seed and encoding, the first seed of all encodings first. Raises UserError as configurations do."""
    if bad := next((word for word in overrides if word.partition("=")[0] in ("--name", "--seed", "--encoding")), None):
        raise UserError(f"{bad}: lab.sweep gives its runs their names, seeds and encodings; see --seeds and --encodings")
    return [
        find(args.base, encoding, [*overrides, f"--seed={seed}"])
        for seed in dict.fromkeys(args.seeds)
        for encoding in dict.fromkeys(args.encodings)
    ]


def to_do(entry: Entry, args: argparse.Namespace) -> list[list[str]]:
    """The scripts that the run still needs: training, evaluation, both or none."""
    scripts = [] if entry.finished else [["train.py", *entry.words]]
    lengths = missing(entry, args)
    if lengths:
        words = ["--lengths", *map(str, lengths), "--max_tokens", str(args.max_tokens), "--append"]
        words += ["--json", str(entry.cfg.folder / "eval.json")]
        words += ["--documents", str(args.documents), "--losses", str(entry.cfg.folder / LOSSES)] if args.documents else []
        scripts.append(["eval_ppl.py", str(entry.cfg.folder), *words, "--data", entry.cfg.data, "--device", entry.cfg.device])
    return scripts


def missing(entry: Entry, args: argparse.Namespace) -> list[int]:
    """The lengths at which the run is still to be evaluated; all, where the documents' losses are not those of its results."""
    if not entry.finished:
        return args.lengths
    asked, losses = questions(entry, args.lengths, args.max_tokens, args.documents or None), entry.cfg.folder / LOSSES
    results = answers(entry, asked)
    lengths = [length for length in args.lengths if length not in {r["length"] for r in results}]
    kept = {r["losses"]["sha256"] for r in results if r.get("losses")}
    whole = not args.documents or (losses.exists() and not lengths and kept == {sha256_file(losses)})
    if lengths or not whole:
        check_data(entry, asked[0])
    return lengths if whole else args.lengths


def results_of(entry: Entry, args: argparse.Namespace) -> list[Result]:
    """The evaluations of the finished run that the command line asks for."""
    return answers(entry, questions(entry, args.lengths, args.max_tokens, args.documents or None))


def answers(entry: Entry, asked: list[Question]) -> list[Result]:
    """What the run's eval.json answers of what is asked."""
    found = read_results(entry.cfg.folder / "eval.json")
    return [answer for question in asked if (answer := question.answer(found))]


def answered(entry: Entry, lengths: list[int], known: dict[str, Any]) -> bool:
    """Whether the report `known` has the run at all lengths, by the encoding's code as it is; an early report does not say."""
    now = source_of(entry.cfg.encoding)
    mine = [r for r in known.get("runs", []) if (r["encoding"], r["seed"]) == (entry.variant, entry.cfg.seed)]
    return set(lengths) <= {r["length"] for r in mine if r.get("source", now) == now}


def report(entries: list[Entry], args: argparse.Namespace, out: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Write JSON, Markdown, figure and losses of documents: the earlier report `known`, and what is finished now.

    Returns what went into the JSON.
    """
    finished = {entry: results_of(entry, args) for entry in entries if entry.finished_now()}
    found = collect(entries[0].cfg, entries[0].variant, finished, known)
    write_json(out, found)
    with atomic_write(out.with_suffix(".md"), "w") as file:
        file.write(render(found))
    if found["summary"]:
        draw(found, out.with_suffix(".png"))
    if args.documents:
        keep_losses([entry.cfg.folder / LOSSES for entry in finished], out.with_suffix(".npz"))
    return found


def keep_losses(paths: Iterable[Path], out: Path) -> None:
    """Put the documents' losses of those runs that have them into `out`, beside those of others that are there."""
    mine = [load(path) for path in paths if path.exists()]
    there = load(out).without([one.runs[0] for one in mine]) if mine and out.exists() else None
    if mine:
        merge([*([there] if there else []), *mine]).save(out)


@command(work_in_files=True)
def main() -> None:
    """Show the plan; unless it is a dry run, do what is left of it, as far as --minutes go, and report."""
    args, overrides = parse_args()
    entries = plan(args, overrides)
    args.lengths = args.lengths or [entries[0].cfg.block_size * n for n in (1, 2, 4, 8)]
    if args.dry_run or not quiet():
        show_plan(entries)
    if args.dry_run:
        return
    refuse_conflicts(entries)
    out = Path(args.json or Path(entries[0].cfg.out_dir) / "lab.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    known = read_report(out)
    left = [e for e in entries if not answered(e, args.lengths, known)]
    refuse_other(known, (left or entries)[0].cfg, args, out, more=bool(left))
    refuse_other_code(left, entries, known.get("runs", []))
    work = [(e, scripts) for e in left if (scripts := to_do(e, args))]
    jobs = [Job(e.cfg.name, scripts, e.cfg.folder.parent / f"{e.cfg.name}.txt") for e, scripts in work]
    count = len(entries) - len(jobs)
    if len(left) < len(entries):
        remark(f"{out} has {len(entries) - len(left)} of the {len(entries)} runs already", stdout=True)

    def done(job: Job) -> None:
        nonlocal count
        count += 1
        results = results_of(next(e for e in entries if e.cfg.name == job.name), args)
        cells = ", ".join(f"{r['length']}: {r['perplexity']:.3f}" for r in results if r["perplexity"])
        remark(f"[{count}/{len(entries)}] {job.name}: {cells} ({time.monotonic() - job.began:.0f} s)", stdout=True)
        report(entries, args, out, known)

    threads = max(1, (os.cpu_count() or 1) // args.jobs) if args.jobs > 1 else 0
    complete = run_all(jobs, args.jobs, threads, 60 * args.minutes, done, args.stagger)
    print(f"\n{render(report(entries, args, out, known))}\n{out}, {out.with_suffix('.md')}, {out.with_suffix('.png')}")
    if not complete:
        print(f"time is up with {len(entries) - count} of {len(entries)} runs left; the same command goes on")
        raise SystemExit(EXIT_REQUEUE)


if __name__ == "__main__":
    main()
