"""Start-up: seconds from the command to train.py's first step, and to each script's --help.

python -m lab.bench startup config/tiny.toml --micro_batch=4
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from core.files import ROOT
from core.sweep.trial import bench_config, bench_data

SCRIPTS = ("train.py", "eval_ppl.py", "sample.py", "table1.py", "prepare_fineweb.py", "-m lab.bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; what is left of the command line is the configuration."""
    parser.add_argument("--rounds", type=int, default=5, help="starts of each command [default: 5]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Start each command `rounds` times, in turn; prints and returns the medians, least and most."""
    cfg = bench_config(rest, 1)
    seconds: dict[str, list[float]] = {name: [] for name in ("first step", *SCRIPTS)}
    with bench_data([cfg], True) as (cfg,):
        for _ in range(args.rounds):
            words = [*rest, f"--data={cfg.data}", f"--tokens_per_step={cfg.tokens_per_step}", f"--eval_tokens={cfg.block_size}"]
            seconds["first step"].append(until_first_step(words))
            for script in SCRIPTS:
                begin = time.perf_counter()
                subprocess.run([sys.executable, *script.split(), "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
                seconds[script].append(time.perf_counter() - begin)
    found = {name: [round(f(times), 3) for f in (statistics.median, min, max)] for name, times in seconds.items()}
    for name, (median, least, most) in found.items():
        what = name if name == "first step" else f"{name} --help"
        print(f"{what:28}{median:>8.2f} s   ({least:.2f} to {most:.2f}, n = {args.rounds})")
    return {
        "n": args.rounds,
        "seconds": {name: dict(zip(("median", "min", "max"), f, strict=True)) for name, f in found.items()},
    }


def until_first_step(words: list[str]) -> float:
    """Seconds from the start of train.py until its log holds the first step."""
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        command = [sys.executable, str(ROOT / "train.py"), *words, f"--out_dir={out}", "--name=startup"]
        log, begin = Path(out) / "startup/log.jsonl", time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not (log.exists() and '"loss"' in log.read_text()):
                if child.poll() is not None:
                    sys.stderr.write(child.stderr.read() if child.stderr else "")
                    raise SystemExit(child.returncode)
                time.sleep(0.01)
            return time.perf_counter() - begin
        finally:
            child.kill()
            child.wait()
