"""Every benchmark after the other, and with --gpu the checks that need one; each result is written as soon as it is there.

    python bench.py all --tiny --json results/bench.json
    python bench.py all --gpu --vs ../nanoGPT --json results/gpu-bench.json      (what `make gpu` runs)

Each runs in a process of its own; what fails or runs out of time is named and the others go on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE1 = ["rope", "carope", "carope_hidden", "learned", "sinusoidal"]
TOY = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--vocab_size=512", "--block_size=256", "--micro_batch=2"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; what is left of the command line goes to every configuration."""
    add = parser.add_argument
    add(
        "--gpu",
        action="store_true",
        help="the GPU's list: tests/test_gpu.py and the kernels' tests first, the paper's micro-batches",
    )
    add("--tiny", action="store_true", help="toy sizes, to see in a minute or two that all of it works")
    add("--device", default="auto", help="auto, cuda or cpu [default: auto]")
    add("--vs", action="append", default=[], metavar="PATH", help="checkouts to time beside ours")
    add("--budget", type=float, default=0.0, help="seconds after which nothing new begins [default: no limit]")
    add("--rounds", type=int, default=20, help="rounds that count, where a benchmark has rounds [default: 20]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Run the stages and return their results by name; failures are listed under `failed`."""
    begin, found, failed = time.monotonic(), {}, {}
    env = os.environ | ({"GPU_TESTS_ON": "cpu"} if args.device == "cpu" else {})
    for name, command in stages(args, rest).items():
        left = args.budget - (time.monotonic() - begin) if args.budget else None
        if left is not None and left < 10:
            failed[name] = "no time left"
            continue
        print(f"--- {name}: {' '.join(command)}", flush=True)
        found[name], error = one_stage(command, env, left)
        if error:
            failed[name] = error
            print(f"{name}: {error}", flush=True)
        if args.json:
            from system.files import write_json

            write_json(Path(args.json), {"unfinished": True, "stages": found, "failed": failed})
    return {"results": rates(found), "stages": {name: result for name, result in found.items() if result}, "failed": failed}


def rates(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per size and encoding that was trained, as benchmarks/scaling.py reads them."""
    keys = ("tokens_per_second", "flops_per_token")
    return [
        {"config": f"{size}-{one['encoding']}", "world_size": 1} | {key: one[key] for key in keys}
        for size in ("tiny", "small")
        for one in (found.get(f"train {size}") or {}).get("results", [])
    ]


def one_stage(command: list[str], env: dict[str, str], seconds: float | None) -> tuple[dict[str, Any] | None, str | None]:
    """Run a stage; its result, and in words why there is none."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path, is_bench = Path(folder) / "result.json", command[0] == "bench.py"
        words = [*command, "--json", str(path)] if is_bench else [*command, f"--junitxml={path}"]
        try:
            code = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return None, f"stopped after {seconds:.0f} s"
        result = None
        if path.exists():
            result = json.loads(path.read_text()) if is_bench else count_tests(path)
        return result, f"exit code {code}" if code else None


def count_tests(path: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped of a JUnit report."""
    from xml.etree import ElementTree

    suite = next(ElementTree.parse(path).iter("testsuite"))
    return {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}


def stages(args: argparse.Namespace, rest: list[str]) -> dict[str, list[str]]:
    """Name → command line of what is run."""
    shared = [f"--device={args.device}", *(TOY if args.tiny else []), *rest]
    rounds = ["--rounds", str(2 if args.tiny else args.rounds)]
    batches = (
        {"tiny": [], "small": []} if args.gpu or args.tiny else {"tiny": ["--micro_batch=4"], "small": ["--micro_batch=2"]}
    )
    vs = [word for path in args.vs for word in ("--vs", path)]
    found: dict[str, list[str]] = {}
    if args.gpu:
        tests = ["tests/test_gpu.py", "tests/test_kernels_rotary.py"]
        found["correctness"] = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    for size, batch in batches.items():
        config = [f"config/{size}.toml", *batch, *shared]
        found[f"train {size}"] = ["bench.py", "train", *config, "--synthetic", *rounds, "--encodings", *TABLE1, *vs]
        found[f"eval {size}"] = ["bench.py", "eval", *config, "--synthetic", *rounds]
    if args.gpu and not args.tiny:
        found["train small, 64 × 512"] = [*found["train small"], "--micro_batch=64", "--no_bare", "--encodings", "rope"]
        found["train small, not compiled"] = [
            *found["train small"],
            "--compile=off",
            "--no_bare",
            "--encodings",
            "rope",
            "carope",
        ]
    tiny, toy = ["config/tiny.toml", *shared], args.tiny
    found["decode"] = ["bench.py", "decode", *tiny, *(["--early=8", "--late=32", "--tokens=16", "--rounds=2"] if toy else [])]
    found["data"] = ["bench.py", "data", *tiny, *(["--tokens=2000000", "--batches=9"] if toy else [])]
    found["rotary"] = ["bench.py", "rotary", f"--device={args.device}", *(["--batch=1", "--rounds=2"] if toy else [])]
    if not args.gpu:
        found["prepare"] = ["bench.py", "prepare", *(["--limit_tokens=200000", "--rounds=2"] if toy else [])]
        found["startup"] = ["bench.py", "startup", *tiny, *(["--rounds=1"] if toy else ["--micro_batch=4"])]
    return found
