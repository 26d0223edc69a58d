"""Shared pieces: a small tokenized corpus, a small configuration, and commands run as a user runs them."""

import atexit
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

pytest_plugins = ["fault_report"]
ROOT = Path(__file__).parent.parent
T = TypeVar("T", str, bytes)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it comes; several tests run at a time
os.environ.update(WANDB_SILENT="true", WANDB__SERVICE_WAIT="300")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `make test &`: what tests interrupt would not hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import core.host  # noqa: E402, F401  isort: skip
import torch  # noqa: E402

from core.files import locked  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it comes


class AtOnce:
    """Says why a test failed as soon as it has: minutes on a GPU can be over before pytest sums up."""

    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.getplugin("terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # when there is a terminal to write to
def pytest_configure(config: pytest.Config) -> None:
    """In the process that prints: one fork server for all workers, and under -vv what failed at once."""
    if hasattr(config, "workerinput"):
        return
    if getattr(config.option, "numprocesses", None) and hasattr(os, "fork"):
        os.environ["FORK_SERVER"] = start_fork_server()
    if config.option.verbose > 0:
        config.pluginmanager.register(AtOnce(config))


@cache
def fork_server() -> list[str]:
    """The words before those of a script that have it run in a process forked from one that has torch (fork_server.py)."""
    path = os.environ.get("FORK_SERVER") or start_fork_server()
    while not os.path.exists(path):
        time.sleep(0.02)
    return [sys.executable, "-S", "-E", str(ROOT / "tests/fork_server.py"), path]


def start_fork_server() -> str:
    """The socket at which it will answer, as long as this process lives."""
    folder = tempfile.mkdtemp()
    server = subprocess.Popen([sys.executable, ROOT / "tests/fork_server.py", f"{folder}/socket"], stdin=subprocess.PIPE)

    def end() -> None:
        server.communicate()
        shutil.rmtree(folder)

    atexit.register(end)
    return f"{folder}/socket"


# Read when Python or a library starts, which in the fork server is over
AT_START = ("PYTHONPROFILE", "LD_", "OMP_", "TRITON_")


def as_modules(args: Sequence[object]) -> list[object]:
    """The words, with -m before a module of ours that is named as such, lab.sweep, say."""

    def is_module(word: str) -> bool:
        path = ROOT.joinpath(*word.split("."))
        return word.startswith(("core.", "lab.")) and (path.with_suffix(".py").exists() or (path / "__main__.py").exists())

    pairs = zip(["", *args], args, strict=False)
    return [word for last, arg in pairs for word in (["-m", arg] if is_module(str(arg)) and last != "-m" else [arg])]


def command_line(args: Sequence[object], env: Mapping[str, str], real: bool) -> list[str]:
    """The words that run a script of the repository with this Python; `real`: in a process that is its own from the start."""
    args = as_modules(args)
    is_plain = args[0] == "-m" or not str(args[0]).startswith("-")
    changed = [name for name, value in env.items() if name.startswith(AT_START) and os.environ.get(name) != value]
    forks = hasattr(os, "fork") and is_plain and not changed and not real
    return [*(fork_server() if forks else [sys.executable]), *map(str, args)]


def run_command(*args: object, real: bool = False, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository; stdout and stderr are captured. `real`: see command_line."""
    env = kwargs.pop("env", {})
    command = command_line(args, env, real)
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, **{"cwd": ROOT} | kwargs)


def sizes_compiled(script: str, folder: Path, *args: object) -> list[int]:
    """What `script` prints, bytes of machine code each, run where Triton compiles for an H100 and does not interpret."""
    path = folder / "compile_kernels.py"
    path.write_text(script)
    done = run_command(path, *args, env={"TRITON_INTERPRET": "0", "PYTHONPATH": ".", "TRITON_CACHE_DIR": str(folder)})
    assert done.returncode == 0, done.stderr
    return [int(size) for size in done.stdout.split()]


@contextmanager
def without_plugins() -> Iterator[None]:
    """What plugins register meanwhile is gone at the end."""
    from core import plugins
    from positional import ENCODINGS

    registered, loaded = ENCODINGS.copy(), plugins._LOADED.copy()
    try:
        yield
    finally:
        for name in plugins._LOADED.keys() - loaded:
            del sys.modules[name]
        for now, before in ((ENCODINGS, registered), (plugins._LOADED, loaded)):
            now.clear()
            now.update(before)


def keep_remote_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have transformers keep the code beside weights in `folder`, and no module of it outlive the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def torchrun(n: int, *args: object, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository on `n` gloo ranks."""
    return run_command("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *args, **kwargs)


class Child(subprocess.Popen[str]):
    """A command that was started. A signal has reached its process, and not only the one that hands it on, on return."""

    def send_signal(self, number: int) -> None:
        server = str(ROOT / "tests/fork_server.py")
        try:  # by the note beside the server's socket
            os.kill(int(Path(f"{self.args[self.args.index(server) + 1]}.{self.pid}").read_text()), number)
        except (FileNotFoundError, ProcessLookupError, ValueError):  # it is its own, or has not begun, or has ended
            super().send_signal(number)


def start_command(*args: object, real: bool = False, **kwargs) -> subprocess.Popen[str]:
    """Start a script of the repository in a process group of its own; stderr is captured. `real`: see command_line."""
    env = kwargs.pop("env", {})
    command, pipes = command_line(args, env, real), {"stderr": subprocess.PIPE, "text": True} | kwargs
    return ends_with_the_test(Child(command, cwd=ROOT, env=os.environ | env, start_new_session=True, **pipes))


STARTED: list[subprocess.Popen[Any]] = []


def ends_with_the_test(child: subprocess.Popen[T]) -> subprocess.Popen[T]:
    """`child`, which with all its children is killed after the test if it still runs."""
    STARTED.append(child)
    return child


@pytest.fixture(autouse=True)
def the_same_random_numbers() -> None:
    """For each test, whichever ran before it in the process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """What a test started ends with it, however that ends."""
    yield
    while STARTED:
        if (child := STARTED.pop()).poll() is None:
            import psutil  # only here: a GPU machine may lack it (tests/test_gpu_plan.py)

            for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            child.communicate()


def wait_until(child: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Return once `condition` holds; it must come to hold while the child lives."""
    while not condition():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)


def obey_modes() -> None:
    """In a process to come, as its preexec_fn: root reads no file whose mode says that nobody may."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """What torchrun's environment says to one of `world_size` ranks on this machine."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


class Hold:
    """A point at which one process of a command waits for the test: before call number `nth` of `where`, "module:function".

    However fast or slow the machine is, what the test does between `reached` and `release` comes at that point.
    """

    def __init__(self, folder: Path, where: str, nth: int = 1) -> None:
        """`folder` gets two empty files."""
        self._held = folder / f"held-{where.rpartition(':')[2]}-{nth}"
        self.env = {"HOLD": f"{where} {nth} {self._held}", "PYTHONPATH": str(ROOT / "tests/hold")}

    def is_reached(self) -> bool:
        """Whether a process has come there."""
        return self._held.exists()

    def reached(self, child: subprocess.Popen[str]) -> None:
        """Return once the process waits there."""
        wait_until(child, self.is_reached)

    def release(self) -> None:
        """Let it continue."""
        self._held.with_name(f"{self._held.name}.go").touch()


def logged(folder: Path) -> int:
    """Number of records in a run's log."""
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def records(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "mfu", "peak_memory_bytes")} for r in lines]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(seconds), 3), "min": round(min(seconds), 3), "max": round(max(seconds), 3)}


def newest_sums(folder: Path) -> dict[str, str]:
    """sha256 of the files in a run's newest checkpoint: weights, optimizer and random-number states."""
    newest = max((folder / "checkpoints").glob("step_*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random-number states and log equal to the last bit."""
    assert records(one) == records(other)
    assert newest_sums(one) == newest_sums(other) and len(newest_sums(one)) == 2


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, for all workers of this start of pytest."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with locked(base / f"{name}-lock", patience=600):
        if not (base / f"{name}-made").exists():
            (base / name).mkdir()
            make(base / name)
            (base / f"{name}-made").touch()
    return base / name


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A data folder prepared from real English by the real command: bytes, 20k validation and about 130k training tokens."""

    def prepare(folder: Path) -> None:
        sizes = ["--val_tokens", 20_000, "--shard_tokens", 50_000, "--limit_tokens", 150_000]
        done = run_command("prepare_fineweb.py", "--source", "demo", "--tokenizer", "bytes", "--out", folder / "corpus", *sizes)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "data", prepare) / "corpus"


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> list[str]:
    """Command-line words of a run that takes a second."""
    return [
        f"--data={corpus}", f"--out_dir={tmp_path}", "--device=cpu", "--dtype=float32", "--n_layer=2", "--n_head=2",
        "--n_embd=32", "--vocab_size=320", "--block_size=32", "--micro_batch=4", "--tokens_per_step=512", "--steps=8",
        "--warmup_steps=2", "--lr=1e-2", "--min_lr=1e-3", "--eval_every=4", "--eval_tokens=4000", "--final_eval_tokens=8000",
        "--save_every=4",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def runs(corpus: Path, tmp_path_factory) -> Path:
    """Folder of two short runs, `carope` and `learned`, trained at length 32."""
    from core.config import load_config
    from train import train

    def train_both(out: Path) -> None:
        for encoding in ("carope", "learned"):
            words = [
                f"--data={corpus}", f"--out_dir={out}", f"--encoding={encoding}", f"--name={encoding}", "--dtype=float32",
                "--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=320", "--block_size=32", "--micro_batch=8",
                "--tokens_per_step=512", "--steps=30", "--warmup_steps=2", "--lr=1e-2", "--final_eval_tokens=500",
            ]  # fmt: skip
            train(load_config(words))

    return once(tmp_path_factory, "runs", train_both)
