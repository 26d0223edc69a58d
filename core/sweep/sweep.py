"""A set of runs: what is missing of them is trained and evaluated, one after the other or several at a time.

Each run and each evaluation is a process of its own: train.py, then eval_ppl.py into the run's eval.json, from which the same
command takes what is there when it is started again.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from core.console import CommandLine, remark
from core.errors import UserError, at_least
from core.files import sha256_file
from core.fingerprint import made_by, other_code
from core.results import Question, Result, read_results
from core.sweep.jobs import Job, Over, places, run_all
from core.sweep.plan import Entry, check_data, questions, read_newest
from core.upload import upload

LOSSES = "losses.npz"  # in a run's folder, the loss of each document


def add_options(parser: CommandLine, encodings: str, seeds: str, lengths: str, max_tokens: str) -> None:
    """What every sweep can be told: which runs and evaluations, and how they share the machine. The words say the defaults."""
    add = parser.add_argument
    what = "names, or config files by path; a --plugin's, too"
    add("--encodings", nargs="+", metavar="ENCODING", help=f"{what} [default: {encodings}]")
    add("--seeds", nargs="+", type=int, metavar="N", help=f"a run of each encoding with each [default: {seeds}]")
    add("--lengths", nargs="+", type=int, metavar="T", help=f"evaluation lengths, tokens [default: {lengths}]")
    what = f"of an evaluation, 0 is all [default: {max_tokens}]"
    add("--max_tokens", "--max-tokens", type=int, default=0, metavar="N", help=what)
    parser.set_defaults(documents=0)  # all in one
    add(
        "--nproc", type=int, default=0, metavar="N", help="processes of a run, a GPU each [default: one, which uses one device]"
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, on GPUs of their own as far as there are any [default: 1]",
    )
    add("--stagger", type=float, default=0, metavar="S", help="seconds between the starts of two runs [default: 0]")
    add("--minutes", type=float, default=0, metavar="M", help="stop after so long, in order [default: 0, never]")
    add("--dry_run", "--dry-run", action="store_true", help="show the plan and leave")


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that cannot be."""
    at_least(1, jobs=args.jobs, lengths=args.lengths)
    at_least(0, nproc=args.nproc, minutes=args.minutes, stagger=args.stagger, max_tokens=args.max_tokens, seeds=args.seeds)


def scripts_left(entry: Entry, args: argparse.Namespace) -> list[list[str]]:
    """What the run still needs, each the words of a script: training, evaluation, both or none."""
    scripts = [] if entry.finished else [["train.py", *entry.words]]
    if lengths := lengths_left(entry, args):
        folder, documents = entry.cfg.folder, args.documents
        words = ["--lengths", *map(str, lengths), "--max_tokens", str(args.max_tokens), "--append"]
        words += ["--json", str(folder / "eval.json"), "--data", entry.cfg.data, "--device", entry.cfg.device]
        words += ["--documents", str(documents), "--losses", str(folder / LOSSES)] if documents else []
        scripts.append(["eval_ppl.py", str(folder), *words])
    return scripts


def lengths_left(entry: Entry, args: argparse.Namespace) -> list[int]:
    """The lengths at which the run is still to be evaluated; all, where the documents' losses are not those of its results."""
    if not entry.finished:
        return args.lengths
    results, losses = results_of(entry, args), entry.cfg.folder / LOSSES
    lengths = [length for length in args.lengths if length not in {r["length"] for r in results}]
    kept = {r["losses"]["sha256"] for r in results if r.get("losses")}
    whole = not args.documents or (losses.exists() and not lengths and kept == {sha256_file(losses)})
    if lengths or not whole:
        check_data(entry, asked(entry, args)[0])
    return lengths if whole else args.lengths


def asked(entry: Entry, args: argparse.Namespace) -> list[Question]:
    """What the command line asks of the finished run."""
    return questions(entry, args.lengths, args.max_tokens, args.documents or None)


def results_of(entry: Entry, args: argparse.Namespace) -> list[Result]:
    """What the run's eval.json answers of what is asked."""
    found = read_results(entry.cfg.folder / "eval.json")
    return [answer for question in asked(entry, args) if (answer := question.answer(found))]


Found = dict[Entry, list[Result]]


def run_left(left: Sequence[Entry], n_all: int, args: argparse.Namespace, report: Callable[[Found], object]) -> Found:
    """Do what is left of the runs in `left`, of `n_all` in all, and call `report` after each; returns what is known of them.

    One at a time, a run has the terminal; of several, each writes what it says to NAME.txt beside its folder. Raises
    SystemExit(75) after a signal, UserError where runs fail, when all others are done.
    """
    work = {entry.cfg.name: (entry, scripts) for entry in left if (scripts := scripts_left(entry, args))}
    found = {entry: results_of(entry, args) for entry in left if entry.cfg.name not in work}
    alone, count = args.jobs == 1, n_all - len(work)

    def job(entry: Entry, scripts: list[list[str]]) -> Job:
        name, log = entry.cfg.name, entry.cfg.folder.with_name(f"{entry.cfg.name}.txt")
        return Job(name, scripts, None if alone else log, args.nproc, silent=("eval_ppl.py",))

    def in_order() -> Found:
        return {entry: found[entry] for entry in left if entry in found}

    def began(job: Job) -> None:
        if alone and not work[job.name][0].finished:
            steps = work[job.name][0].cfg.steps
            remark(f"\n[{count + 1}/{n_all}] {job.name}: {steps:,} steps, then its perplexities", stdout=True)

    def done(job: Job) -> None:
        nonlocal count
        count += 1
        entry = work[job.name][0]
        if not entry.finished:
            entry = replace(entry, state=read_newest(entry.cfg.folder))
        if entry.state and (how := other_code(vars(entry.state), made_by(entry.cfg))):
            raise Over(f"{entry.cfg.folder}: {how}, while this command ran; move it away and start again")
        results = results_of(entry, args)
        if len(results) < len(args.lengths):
            raise UserError(f"{entry.cfg.folder / 'eval.json'}: has no result of the run's last weights; start again")
        if entry.cfg.wandb != "disabled":
            share(entry.cfg.folder, results)
        found[entry] = results
        report(in_order())
        cells = ", ".join(f"{r['perplexity']:.2f} at length {r['length']}" for r in results if r["perplexity"])
        tokens = max(r["tokens"] or 0 for r in results)
        took = f"; {time.monotonic() - job.began:.0f} s" if not alone else ""
        print(f"[{count}/{n_all}] {job.name}: ppl {cells or '–'}; {tokens:,} tokens{took}", flush=True)

    jobs = [job(entry, scripts) for entry, scripts in work.values()]
    where = places(args.jobs, args.nproc, [entry.cfg.device for entry, _ in work.values()])
    run_all(jobs, where, 60 * args.minutes, done, began, args.stagger)
    return in_order()


def share(folder: Path, results: list[Result]) -> None:
    """Put the results of the run in `folder` into its run at Weights & Biases; the sweep does without where that fails."""
    try:
        upload(folder, results)
    except UserError as error:
        print(f"warning: {error}; eval_ppl.py {folder} --wandb uploads its perplexities", file=sys.stderr)
