"""Run everything that needs a GPU in ten minutes, the most valuable first; each result is written as soon as it is known.

    make gpu OUT=results                                machine, correctness, speed, laboratory: ten minutes
    make lab-gpu OUT=results GPU_ARGS="--budget 190"    continues the laboratory
    make gpu OUT=/tmp/gpu GPU_ARGS=--rehearse           all of it at toy sizes on a CPU

It needs what `python -m lab.bench.gpu_pack` packs, and no network. Runs, data and logs are kept in runs/gpu/, so that the same
command continues the laboratory. Graphs compile while correctness is tested, and the laboratory gets all the time that is left.
Where there is no .git folder, the variable CAROPE_COMMIT names the commit.
"""

import argparse
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from core.console import CommandLine, given_path, this_command
from core.errors import EXIT_REQUEUE, UserError, command
from core.files import ROOT, write_json
from core.host import signals_to
from lab.bench.gpu_sampler import Sampler

TEXT = "text.jsonl.xz"  # in the kit
# Seconds kept for each stage, the start of the process among the first's; what they leave is the laboratory's
SECONDS = {"machine": 30, "correctness": 90, "speed": 175, "lab": 270}
PATIENCE = 160  # seconds from its start until speed begins to time, with what is compiled by then
SAVING = 15  # seconds that the laboratory's runs have to save
STAGGER = 20  # seconds between their starts: one compiles while others compute
TESTS = [f"tests/test_{name}.py" for name in ("gpu", "kernels_rotary", "kernels_key_bias", "kernels_cross_entropy")]
SPEED = [  # in the order in which they are compiled, after the peers
    "rope", "carope", "carope_hidden", "rope,config/tiny.toml", "carope,config/tiny.toml", "carope_hidden,config/tiny.toml",
    "rope,micro_batch=64", "rope,block_size=1024,micro_batch=16", "rope,kernel=eager", "learned", "sinusoidal",
    "learned,config/tiny.toml", "sinusoidal,config/tiny.toml",
]  # fmt: skip
LAB = [
    "rope", "carope", "carope_hidden", "nope", "learned", "sinusoidal", "alibi", "t5", "fire", "carope_scalar", "rope_bf16pos",
    "carope_nobias", "partial_rope", "xpos", "carope_per_layer", "carope_hidden_shared",
]  # fmt: skip
LAB_TINY = ["rope", "carope", "carope_hidden"]
TOY = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=32", "--micro_batch=2", "--block_size=32"]


def absolute(word: str) -> Path:
    """A path that stays the same in our own folder."""
    return Path(given_path(word)).absolute()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--out", type=absolute, required=True, metavar="FOLDER", help="where results are written")
    add("--kit", type=absolute, default=".gpu", metavar="FOLDER", help="what gpu_pack packed [default: .gpu]")
    add(
        "--work",
        type=absolute,
        default="runs/gpu",
        metavar="FOLDER",
        help="where runs, data and logs are kept [default: runs/gpu]",
    )
    add("--budget", type=float, help="seconds for all of it [default: 570, of a rehearsal ten times as many]")
    add("--only", nargs="+", choices=list(SECONDS), metavar="STAGE", help=f"some of {', '.join(SECONDS)} [default: all]")
    add("--rehearse", action="store_true", help="toy sizes on a CPU, to see that all of it works")
    return parser.parse_args()


@command
def main() -> None:
    """Do the plan; exit code 1 where a stage failed."""
    plan = Plan(parse_args(), time.monotonic())
    os.chdir(ROOT)
    try:
        with signals_to(lambda number: sys.exit(128 + number), "SIGTERM"):
            plan.do()
    finally:
        plan.close()
    print(f"\n{plan.seconds():.0f} s; {'all went well' if not plan.failed else 'failed: ' + json.dumps(plan.failed)}")
    raise SystemExit(bool(plan.failed))


class Plan:
    """The stages' results by name, why others failed, and the time that is left."""

    def __init__(self, args: argparse.Namespace, begin: float) -> None:
        self.args, self._begin = args, begin
        self.slower = 10 if args.rehearse else 1  # a CPU that others use too
        self.budget = args.budget or 570 * self.slower
        self.out, self.work = args.out, args.work
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        self.site, self.data = self.work / "site", self.work / "data"
        self.children: list[subprocess.Popen[str]] = []
        self.stages: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self._sampler, self._copied = Sampler(), dict[Path, int]()
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        # Of each of several processes
        self.env |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "1" if args.rehearse else "2"}
        if args.rehearse:
            self.env["GPU_TESTS_ON"] = "cpu"

    def do(self) -> None:
        """All stages that are wanted, in their order."""
        install_wheels(self.args.kit, self.site)
        text = Thread(target=self.prepare_text)
        if self.wants("lab"):
            text.start()
        toy = ["--rounds=2", "--device=cpu"] if self.args.rehearse else []
        self.run("machine", ["-m", "lab.bench", "machine", *toy])
        speed = self.begin_speed() if self.wants("speed") else None
        self.correctness()
        if speed:
            self.end_speed(speed)
        if self.wants("lab"):
            text.join()
            self.laboratory()

    def close(self) -> None:
        """End what still runs."""
        self._sampler.close()
        for child in self.children:
            end(child)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - self.seconds()

    def limit(self, name: str) -> float:
        """Seconds that the stage may take from now on."""
        return min(SECONDS[name] * self.slower, self.left())

    def wants(self, name: str) -> bool:
        """Whether the command line asks for the stage."""
        return name in (self.args.only or SECONDS)

    def prepare_text(self) -> None:
        """Unpack the text and make shards of it; what is there stays."""
        val = {"bytes": 3000, "gpt2": 1000} if self.args.rehearse else {"bytes": 4_000_000, "gpt2": 3_000_000}
        try:
            prepare(unpack(self.args.kit, self.data), self.data, val, self.env)
        except UserError as error:
            self.failed["text"] = str(error)

    def start(self, command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[str]:
        """Start a script of ours, in a process group of its own, so that it can be ended with all that it starts."""
        print(f"\n--- {self.seconds():.0f} s: {' '.join(command)}", flush=True)
        own: dict[str, Any] = {"env": self.env, "process_group": 0, "text": True, "stderr": subprocess.STDOUT}
        with open(log, "w") as file:
            self.children.append(subprocess.Popen([sys.executable, *command], stdout=file, **own, **options))
        return self.children[-1]

    def finish(
        self, name: str, child: subprocess.Popen[str], seconds: float, since: float, copies: Sequence[Path] = ()
    ) -> None:
        """Wait for a stage, `seconds` at most; copy files out whenever they change, and write its result."""
        stop, why = time.monotonic() + seconds, None
        while child.poll() is None:
            if time.monotonic() > stop:
                why = f"stopped after {self.seconds() - since:.0f} s"
                end(child)
            time.sleep(0.2)
            self.copy_out(copies)
        self.copy_out(copies)
        if child.returncode and not why:
            why = f"exit code {child.returncode}"
        result = self.work / f"{name}.json"
        found = json.loads(result.read_text()) if name in SECONDS and result.exists() else {}
        took = {"from_second": round(since), "to_second": round(self.seconds())}
        self.keep(name, found | took | {"gpu_under_load": self._sampler.summary(self._begin + since)}, why)

    def copy_out(self, paths: Sequence[Path]) -> None:
        """Copy what is there and has changed."""
        for path in paths:
            if path.exists() and (changed := path.stat().st_mtime_ns) != self._copied.get(path):
                shutil.copy(path, self.out)
                self._copied[path] = changed

    def keep(self, name: str, found: dict[str, Any], why_not: str | None = None) -> None:
        """Write a stage's result beside those of the others."""
        self.stages[name] = found
        if why_not:
            self.failed[name] = why_not
            print(f"{name}: {why_not}", flush=True)
        if self.args.only == ["lab"]:
            return
        machine = {key: value for key, value in self.stages.get("machine", {}).items() if key in ("device", "git", "versions")}
        results = rates(self.stages.get("speed", {}).get("results", []))
        whole = {"command": " ".join(["python", *this_command()]), **machine, "results": results}
        write_json(self.out / "gpu-bench.json", whole | {"stages": self.stages, "failed": self.failed})

    def run(self, name: str, command: list[str]) -> None:
        """A stage that is one command, which writes its result itself."""
        if self.wants(name):
            since, log = self.seconds(), self.work / f"{name}.txt"
            child = self.start([*command, "--json", str(self.fresh(f"{name}.json"))], log)
            self.finish(name, child, self.limit(name), since)
            show(log)

    def fresh(self, name: str) -> Path:
        """A file for this start's result."""
        (self.work / name).unlink(missing_ok=True)
        return self.work / name

    def correctness(self) -> None:
        """The tests that need a GPU, several at a time; the log has a line for each as soon as it ends."""
        if not self.wants("correctness"):
            return
        since, log = self.seconds(), self.out / "gpu-tests.txt"
        some = ["-n", "2", "-k", "preflight or samples or (cpu and carope_hidden)"] if self.args.rehearse else ["-n", "10"]
        words = ["-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow", "--dist", "loadgroup"]
        child = self.start([*words, *some, *TESTS], log)
        self.finish("correctness", child, self.limit("correctness"), since)
        found = outcomes(log.read_text())
        self.keep("correctness", self.stages["correctness"] | found)
        print(found, flush=True)

    def begin_speed(self) -> tuple[subprocess.Popen[str], float]:
        """Have the candidates compile; they wait for `end_speed` to be timed."""
        small, tiny = ["config/small.toml", "--synthetic", "--no_bare", "--wait"], ",config/tiny.toml"
        names, sizes, peer_sizes = SPEED, ["--rounds=10", "--warmup=2", "--micro_steps=8", "--at_once=6"], ["", tiny]
        if self.args.rehearse:
            names, peer_sizes = ["rope", "carope", f"rope{tiny}", "rope,block_size=16,micro_batch=4"], [tiny]
            sizes = [*TOY, "--vocab_size=512", "--rounds=2", "--warmup=1", "--micro_steps=2", "--at_once=2"]
        peers = [f"--vs={path}{size}" for path in sorted(self.args.kit.glob("peers/*")) for size in peer_sizes]
        result = ["--profile", str(self.out / "gpu-profile.txt"), "--json", str(self.fresh("speed.json"))]
        words = ["-m", "lab.bench", "train", *small, *sizes, f"--patience={PATIENCE * self.slower}", *result, *peers]
        words += ["--encodings", *names]
        return self.start(words, self.work / "speed.txt", stdin=subprocess.PIPE), self.seconds()

    def end_speed(self, started: tuple[subprocess.Popen[str], float]) -> None:
        """Time the candidates that are ready."""
        child, since = started
        with suppress(OSError):  # it has failed already
            print(file=child.stdin, flush=True)
        self.finish("speed", child, self.limit("speed"), since, [self.work / "speed.json"])
        (self.out / "speed.json").unlink(missing_ok=True)  # it is in gpu-bench.json now
        show(self.work / "speed.txt")

    def laboratory(self) -> None:
        """The small GPT with many encodings, then GPT-Tiny, in the time that is left."""
        for size, tokenizer, encodings, longest in (("lab-gpu", "bytes", LAB, 8192), ("lab-gpu-tiny", "gpt2", LAB_TINY, 4096)):
            if self.left() < 2 * SAVING or "text" in self.failed:
                break
            results = [self.work / f"{size}.json", self.work / f"{size}.npz"]
            for path in results:  # continue an earlier laboratory
                if (ROOT / "results" / path.name).exists() and not path.exists() and not self.args.rehearse:
                    shutil.copy(ROOT / "results" / path.name, path)
            lengths = [str(512 << i) for i in range(5) if 512 << i <= longest]
            words = [f"--data={self.data / tokenizer}", f"--out_dir={self.work / size}", "--max_tokens", "0", "--seeds", "1"]
            words += ["--json", str(results[0]), "--minutes", f"{(self.left() - SAVING) / 60:.2f}"]
            if self.args.rehearse:
                encodings, lengths, longest = encodings[:2], ["32", "64"], 64
                words += [*TOY, "--steps=4", "--warmup_steps=1", "--tokens_per_step=128"]
            words += ["--encodings", *encodings, "--lengths", *lengths, "--documents", str(longest)]
            since, jobs = self.seconds(), ["--jobs=2"] if self.args.rehearse else ["--jobs=4", f"--stagger={STAGGER}"]
            child = self.start(["-m", "lab.sweep", f"config/{size}.toml", *jobs, *words], self.work / f"{size}.txt")
            self.finish(size, child, self.left(), since, results)
            if child.returncode == EXIT_REQUEUE:  # time was up, as planned
                self.failed.pop(size)
            show(self.work / f"{size}.txt")
        if "text" in self.failed:
            print(f"lab: {self.failed['text']}", flush=True)


def install_wheels(kit: Path, site: Path) -> None:
    """Install the packed wheels into the folder `site`, which is emptied first. Raises UserError where pip cannot."""
    wheels = sorted(map(str, kit.glob("wheels/*.whl")))
    shutil.rmtree(site, ignore_errors=True)
    words = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    if wheels and subprocess.run([sys.executable, "-m", "pip", *words, *wheels]).returncode:
        raise UserError(f"{kit}/wheels: pip cannot install them; its message stands above")


def unpack(kit: Path, folder: Path) -> Path:
    """The packed text as a file in `folder`; xz compares its sha256. Raises UserError where it is damaged or not there."""
    text, packed = folder / "text.jsonl", kit / TEXT
    if text.exists():
        return text
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lzma.open(packed) as source, open(f"{text}.part", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
        os.replace(f"{text}.part", text)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{packed}: cannot be unpacked ({error}); python -m lab.bench.gpu_pack --text makes it") from None
    return text


def prepare(text: Path, folder: Path, val_tokens: Mapping[str, int], env: Mapping[str, str]) -> None:
    """Shards of `text`, in a folder for each tokenizer of `val_tokens`. Raises UserError where prepare_fineweb.py fails."""
    for tokenizer, n_val in val_tokens.items():
        where = ["--source", str(text), "--out", str(folder / tokenizer)]
        what = ["--tokenizer", tokenizer, "--val_tokens", str(n_val), "--workers", "4"]
        if code := subprocess.run([sys.executable, "prepare_fineweb.py", "--quiet", *where, *what], env=env).returncode:
            raise UserError(f"{folder / tokenizer}: prepare_fineweb.py ended with exit code {code}; its message stands above")


def show(log: Path) -> None:
    """Print what a stage said, without the JSON that it ended with."""
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(line for line in lines if not line.startswith("{")), flush=True)


def end(child: subprocess.Popen[str]) -> None:
    """End a process and what it has started, unless it has ended by itself: asked first, then not."""
    if child.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def outcomes(log: str) -> dict[str, Any]:
    """How many tests of pytest's -vv log passed, failed and so on, and the names of those that did not pass."""
    found = re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)", log)
    last = {test: outcome for outcome, test in found}
    counts = {
        name.lower(): sum(1 for outcome in last.values() if outcome == name)
        for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    return counts | {"not_passed": [test for test, outcome in last.items() if outcome in ("FAILED", "ERROR")]}


def rates(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each encoding of GPT-Small and GPT-Tiny, as core/sweep/scaling.py reads them."""
    keys = ("tokens_per_second", "flops_per_token")
    rows = []
    for one in results:
        encoding, *options = one["candidate"].split(",")
        if options in ([], ["config/tiny.toml"]):
            size = "tiny" if options else "small"
            rows.append({"config": f"{size}-{encoding}", "world_size": 1} | {key: one[key] for key in keys})
    return rows


if __name__ == "__main__":
    main()
