"""Table 1: train what is missing, evaluate, and put our perplexities beside the paper's.

    python table1.py --dry_run                       # what is there, what is left, how long it takes
    python table1.py --nproc 2                       # the paper's eight runs on two GPUs, then the table
    python table1.py --sizes tiny --encodings rope carope_hidden --lengths 512 1024 2048 --seed=2

A run is config/SIZE.toml under config/ENCODING.toml; any --key=value goes to every run. Started again it goes on where
it was. Writes table1.md, table1.json and table1.png.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host  # noqa: F401  before torch, which reads what it sets
from benchmarks.scaling import hours_from, summary
from config import Config, load_config
from errors import EXIT_REQUEUE, UserError, command
from files import atomic_write, write_json
from watchdog import PARENT

HERE = Path(__file__).parent
# Perplexity on 0.1B held-out tokens of FineWeb-Edu, Table 1 of arXiv 2507.23083
PAPER = {
    ("small", 512): {"rope": 21.31, "carope": 21.23, "learned": 21.90, "sinusoidal": 22.14},
    ("small", 1024): {"rope": 56.61, "carope": 21.39, "sinusoidal": 166.18},
    ("tiny", 512): {"rope": 29.33, "carope": 28.99, "learned": 30.48, "sinusoidal": 30.62},
    ("tiny", 1024): {"rope": 81.27, "carope": 36.74, "sinusoidal": 223.28},
}
H100S = 2  # the paper's, for the hours of runs whose speed nobody measured yet


@dataclass(frozen=True)
class Entry:
    """One run of the plan: config/SIZE.toml under config/VARIANT.toml, and how far it is."""

    size: str
    variant: str
    cfg: Config
    step: int
    finished: bool = False
    conflict: str | None = None  # why the run in its folder is another one

    @property
    def tokens_left(self) -> int:
        return (self.cfg.steps - self.step) * self.cfg.tokens_per_step

    @property
    def status(self) -> str:
        if self.conflict:
            return "another run"
        if self.finished:
            return "finished"
        return f"at step {self.step:,}" if self.step else "missing"


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--sizes", nargs="+", default=["tiny", "small"], help="files in config/ [default: tiny small]")
    add(
        "--encodings",
        nargs="+",
        default=["rope", "carope", "learned", "sinusoidal"],
        help="files in config/ [default: the paper's four]",
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
    add("--out", default=None, help="folder of table1.* [default: the runs' out_dir]")
    add("--dry_run", "--dry-run", action="store_true", help="show the plan and leave")
    args, rest = parser.parse_known_args()
    return args, [word for word in rest if word != "--"]


def plan(sizes: list[str], encodings: list[str], overrides: list[str]) -> list[Entry]:
    """An entry per size and encoding. Raises UserError for a configuration that cannot be."""
    from checkpoint import newest_checkpoint
    from run import check_same

    if any(word.partition("=")[0] == "--name" for word in overrides):
        raise UserError("--name: table1.py names its runs SIZE-ENCODING; --out_dir keeps sets of runs apart")
    entries = []
    for size in sizes:
        for encoding in encodings:
            cfg = load_config([str(HERE / f"config/{size}.toml"), str(HERE / f"config/{encoding}.toml"), *overrides])
            found = newest_checkpoint(cfg.folder)
            try:
                if found:
                    check_same(found[1], cfg, {})
                entries.append(Entry(size, encoding, cfg, *((found[1].step, found[1].finished) if found else (0,))))
            except UserError as error:
                entries.append(Entry(size, encoding, cfg, 0, conflict=str(error)))
    return entries


def measured_rate(entry: Entry) -> float | None:
    """Median tokens/s in the log of the entry's run; None where it has none."""
    log = entry.cfg.folder / "log.jsonl"
    if entry.conflict or not log.exists():
        return None
    records = (json.loads(line) for line in log.read_text().splitlines())
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return statistics.median(rates) if rates else None


def hours_left(entries: list[Entry]) -> list[tuple[float | None, bool]]:
    """(hours, whether from a measured rate) per entry; a run without a log borrows the rate of its size.

    Where there is none, they are those that benchmarks/scaling.py predicts; None where it cannot.
    """
    rates = [measured_rate(entry) for entry in entries]
    hours: list[tuple[float | None, bool]] = []
    for entry, rate in zip(entries, rates, strict=True):
        same_size = [r for e, r in zip(entries, rates, strict=True) if r and e.size == entry.size]
        rate = rate or (statistics.median(same_size) if same_size else None)
        hours.append((entry.tokens_left / rate / 3600, True) if rate else (hours_from(entry.cfg, entry.step, H100S), False))
    return hours


def show_plan(entries: list[Entry]) -> None:
    """Print what is there and what is left."""
    print(f"{'run':24}{'status':>16}{'tokens left':>18}{'hours':>10}")
    hours = hours_left(entries)
    for entry, (time, measured) in zip(entries, hours, strict=True):
        shown = "–" if time is None else f"{time:.1f}"
        print(f"{entry.cfg.name:24}{entry.status:>16}{entry.tokens_left:>18,}{shown:>9}{' ' if measured else '*'}")
    total = sum(time or 0 for time, _ in hours)
    print(f"{'together':24}{'':16}{sum(e.tokens_left for e in entries):>18,}{total:>9.1f}")
    if guessed := [(e.cfg, e.step) for e, (_, measured) in zip(entries, hours, strict=True) if not measured]:
        print(f"* predicted for {H100S} GPUs (docs/scaling.md); the speed of this machine is known after the first steps")
        print(summary(guessed))


def launch(script: str, arguments: list[str], nproc: int) -> None:
    """Run one of our scripts, on nproc ranks where nproc > 0; signals go on to it, so that it saves and leaves."""
    launcher = [str(HERE / "launch.py"), f"--nproc_per_node={nproc}"] if nproc else []
    env = os.environ | {PARENT: str(os.getpid())}
    child = subprocess.Popen([sys.executable, *launcher, str(HERE / script), *arguments], env=env)
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if received or code == EXIT_REQUEUE:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(EXIT_REQUEUE)
    if code:
        raise UserError(f"{script} {' '.join(arguments)}: failed with exit code {code}; its message stands above")


def train_and_evaluate(entry: Entry, args: argparse.Namespace, overrides: list[str]) -> list[dict[str, Any]]:
    """Finish the run and its evaluation, where they are not; returns one result per length."""
    if not entry.finished:
        files = [str(HERE / f"config/{name}.toml") for name in (entry.size, entry.variant)]
        launch("train.py", [*files, *overrides], args.nproc)
    path = entry.cfg.folder / "eval.json"
    wanted = {(length, entry.cfg.steps, args.max_tokens) for length in args.lengths}
    if not wanted <= {(r["length"], r["step"], r["max_tokens"]) for r in read_results(path)}:
        evaluate_entry(entry, args, path)
    results = {r["length"]: r for r in read_results(path)}
    paper = {length: PAPER.get((entry.size, length), {}).get(entry.variant) for length in args.lengths}
    about = {"size": entry.size, "variant": entry.variant, "seed": entry.cfg.seed}
    return [{**about, **results[n], "paper": paper[n]} for n in args.lengths]


def evaluate_entry(entry: Entry, args: argparse.Namespace, path: Path) -> None:
    """Write the perplexities of a finished run to `path`; here, or on --nproc processes."""
    from distributed import Distributed
    from eval_ppl import evaluate_run

    if args.nproc:
        words = ["--lengths", *map(str, args.lengths), "--max_tokens", str(args.max_tokens), "--json", str(path)]
        launch(
            "eval_ppl.py", [str(entry.cfg.folder), *words, "--data", entry.cfg.data, "--device", entry.cfg.device], args.nproc
        )
        return
    with Distributed.start(entry.cfg.device) as dist:
        results = evaluate_run(entry.cfg.folder, args.lengths, dist, max_tokens=args.max_tokens, data=entry.cfg.data)
    write_json(path, results)
    print(", ".join(f"{r['length']}: {r['perplexity']:.2f}" if r["perplexity"] else f"{r['length']}: –" for r in results))


def read_results(path: Path) -> list[dict[str, Any]]:
    """What eval_ppl.py wrote, or nothing where it has not or not in this form."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


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


@command
def main() -> None:
    """Show the plan; unless it is a dry run, do what is left of it and render the table."""
    args, overrides = parse_args()
    entries = plan(args.sizes, args.encodings, overrides)
    show_plan(entries)
    conflicts = [entry.conflict for entry in entries if entry.conflict]
    if args.dry_run:
        print(*conflicts, sep="\n", end="\n" if conflicts else "")
        return
    if conflicts:
        raise UserError(conflicts[0])
    results = []
    out = Path(args.out or entries[0].cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        results += train_and_evaluate(entry, args, overrides)
        write_json(out / "table1.json", results)
    with atomic_write(out / "table1.md", "w") as file:
        file.write(render(results))
    draw(results, out / "table1.png")
    print(f"\n{render(results)}\n{out}/table1.md, table1.json, table1.png")


if __name__ == "__main__":
    main()
