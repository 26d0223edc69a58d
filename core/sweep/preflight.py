"""Before the hours and the money of Table 1: every run of the plan for a few steps, on the GPUs and disks that are to bear it.

    python table1.py --nproc 2 --preflight

Each check says its line when it is done; what a user must put right comes together in one error at the end. Nothing is left
behind: the one checkpoint lies in a folder below out_dir that is deleted, random tokens in the system's temporary folder.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from shutil import rmtree
from typing import NoReturn

import torch
from torch.distributed import DistError

from core.checkpoint import FOLDER as CHECKPOINTS
from core.config import grad_accum
from core.distributed import Distributed
from core.errors import EXIT_REQUEUE, UserError
from core.files import locked, write_json
from core.host import TO_LEAVE, signals_to
from core.measure import interleave
from core.provenance import device_name, environment
from core.sweep.needs import Found, check_files, n_parameters
from core.sweep.plan import Entry
from core.sweep.scaling import Machine
from core.sweep.trial import bench_config, bench_data, first_line, take_steps
from text.progress import gigabytes

MICRO_STEPS = 4  # of a step at most, where a run's own has more; from the second on there are gradients to hold, too
STEPS = 5  # timed
FOLDER = ".preflight"  # below out_dir
COLUMNS = "{:24}{:>12}{:>10}{:>8}{:>12}{:>8}"


def preflight(entries: Sequence[Entry], report: str | None) -> None:
    """Check what the runs of the plan need, and try those that are not finished; `report` is a JSON file to write, too.

    Raises UserError, on all ranks, with everything that a user must put right before the runs.
    """
    cfg, found = entries[0].cfg, Found(problems=[])
    try:
        with signals_to(leave, *TO_LEAVE), Distributed.start(cfg.device, cfg.dtype, cfg.dist_timeout) as dist:
            found |= check_all([entry for entry in entries if not entry.finished], dist)
            if dist.is_main and report:
                write_json(Path(report), environment(dist, 0) | found)
    except DistError as error:
        why = f"{first_line(error)}; NCCL_DEBUG=INFO in the environment says more"
        raise UserError(f"the ranks cannot exchange: {why}") from None
    if found["problems"]:
        raise UserError(f"not ready: {'; '.join(found['problems'])}")


def leave(_number: int) -> NoReturn:
    """What a signal does: the files that were made go on the way out."""
    raise SystemExit(EXIT_REQUEUE)


def check_all(todo: list[Entry], dist: Distributed) -> Found:
    """All checks, those that cost least first, and what the runs will cost by them."""
    if not todo:
        say(dist, "all runs are finished, nothing to try")
        return {}
    begin, largest = time.perf_counter(), max(todo, key=lambda entry: n_parameters(entry.cfg))
    say(dist, f"{dist.world_size} × {device_name(dist.device)}, {memory(dist.device)}, torch {torch.__version__}")
    exchange = check_exchange(n_parameters(largest.cfg), dist)
    data, disks = dist.from_main(check_files(todo) if dist.is_main else None)
    for one in (*data.values(), *disks):
        say(dist, one.pop("line"))
    say(dist, COLUMNS.format("run", "tokens/s", "memory", "loss", "first step", "hours"))
    with nullcontext() if problems(disks) else scratch(Path(largest.cfg.out_dir), dist) as folder:
        results = [try_run(e, dist, "train_tokens" not in data[e.cfg.data], folder if e is largest else None) for e in todo]
    cost, wrong = sum_up(results, dist), problems([exchange, *data.values(), *disks, *results])
    say(dist, f"{'not ready' if wrong else 'all is well'}, {time.perf_counter() - begin:.0f} s")
    return {"exchange": exchange, "data": data, "disks": disks, "results": results, "problems": wrong} | cost


def say(dist: Distributed, text: str) -> None:
    """A line of the result, once among all ranks."""
    if dist.is_main:
        print(text, flush=True)


def problems(found: Sequence[Found]) -> list[str]:
    """Those that checks have found."""
    return [one["problem"] for one in found if "problem" in one]


def memory(device: torch.device) -> str:
    """How much a GPU has, in words; of another device, what figures of memory are."""
    return f"{gigabytes(torch.cuda.mem_get_info(device)[1])} each" if device.type == "cuda" else "memory resident so far"


def check_exchange(count: int, dist: Distributed) -> Found:
    """All-reduce `count` fp32 numbers, as many as the gradients of a step: is the sum right, and how fast is it?

    `bus_bytes_per_second` is nccl-tests' busbw, 2 (n−1)/n · bytes / seconds: what a link carries in one direction.
    """
    n = dist.world_size
    if not torch.distributed.is_initialized():
        say(dist, "exchange: none, one process")
        return {}
    x_P = torch.full((count,), dist.rank + 1.0, device=dist.device)
    wrong = dist.any(bool((dist.sum_(x_P) != n * (n + 1) / 2).any()))
    x_P.zero_()  # sums of sums would grow
    seconds = statistics.median(interleave({"sum": lambda: dist.sum_(x_P)}, 5, 2, dist.device)["sum"])
    bus, backend = 2 * (n - 1) / n * x_P.nbytes / seconds, torch.distributed.get_backend()
    what = f"{backend}, all-reduce of {gigabytes(x_P.nbytes)} in {1e3 * seconds:.2f} ms, bus bandwidth {bus / 1e9:.2f} GB/s"
    say(dist, f"exchange: {what}, the sum is {'WRONG' if wrong else 'right'}")
    found = {"backend": backend, "bytes": x_P.nbytes, "seconds": seconds, "bus_bytes_per_second": bus}
    return found | ({"problem": f"{backend}: the sum of an all-reduce is wrong"} if wrong else {})


@contextmanager
def scratch(out_dir: Path, dist: Distributed) -> Iterator[Path]:
    """A folder below out_dir, the same for all ranks; at the end it goes, with what of out_dir was made for it.

    What a process left that was killed goes, too; a lock keeps others out. Raises UserError where it cannot be made.
    """
    folder = out_dir / FOLDER
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def remove() -> None:
        with suppress(OSError):  # of the first that is not empty: others use it by now
            for path in filter(Path.exists, made):
                path.rmdir()

    with ExitStack() as held:
        with dist.together():
            if dist.is_main:
                held.callback(remove)
                held.enter_context(locked(folder))
                held.callback(rmtree, folder, ignore_errors=True)
                rmtree(folder / CHECKPOINTS, ignore_errors=True)
        yield folder


def try_run(entry: Entry, dist: Distributed, synthetic: bool, folder: Path | None) -> Found:
    """The first steps of a run, and a checkpoint of it in `folder` if there is one; its memory is free again afterwards."""
    name, grad_steps = entry.cfg.name, grad_accum(entry.cfg, dist.world_size)
    found: Found = {
        "config": name,
        "grad_accum": grad_steps,
        "micro_steps": min(MICRO_STEPS, grad_steps),
        "synthetic": synthetic,
    }
    try:
        with bench_data([bench_config([*entry.words], found["micro_steps"])], synthetic) as (cfg,):
            found |= take_steps(cfg, dist, STEPS, folder)
        found["hours"] = entry.tokens_left / found["tokens_per_second"] / 3600
        say(dist, row(found))
    except UserError as error:
        found["problem"] = str(error)
    if "problem" in found:
        say(dist, f"{name:24}{found['problem']}")
        found["problem"] = f"{name}: {found['problem']}"
    gc.collect()
    torch.compiler.reset()  # else it holds what it has compiled for this run
    if dist.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def row(found: Found) -> str:
    """A run's line of the table, and the checkpoint's where one was tried."""
    speed, peak, loss = (
        f"{found['tokens_per_second']:,.0f}",
        gigabytes(found["peak_memory_bytes"]),
        f"{found['losses'][-1]:.2f}",
    )
    text = COLUMNS.format(found["config"], speed, peak, loss, f"{found['first_step_seconds']:.1f} s", f"{found['hours']:.1f}")
    if "checkpoint" not in found:
        return text
    size, write, load = (found["checkpoint"][key] for key in ("bytes", "write_seconds", "load_seconds"))
    same = "; all came back bit for bit" if "problem" not in found else ""
    return f"{text}\n  its checkpoint: {gigabytes(size)} written in {write:.1f} s, resumed from in {load:.1f} s{same}"


def sum_up(results: Sequence[Found], dist: Distributed) -> Found:
    """Hours and money of what the measured runs have left, at the price of docs/scaling.md."""
    measured = [one for one in results if "hours" in one]
    if not measured:
        return {}
    n, hours = dist.world_size, sum(one["hours"] for one in measured)
    dollars = n * hours * Machine.dollars
    say(dist, COLUMNS.format(f"{len(measured)} of {len(results)} together", "", "", "", "", f"{hours:.1f}"))
    unit = "GPU" if dist.device.type == "cuda" else "device"
    say(dist, f"{n * hours:.1f} {unit}-hours on {n}, ${dollars:,.0f} at ${Machine.dollars:.2f} per {unit}-hour")
    taken, own = (" or ".join(map(str, sorted({one[key] for one in measured}))) for key in ("micro_steps", "grad_accum"))
    say(dist, f"measured in {STEPS} steps of {taken} micro-steps, a run's have {own}; validation and checkpoints come on top")
    return {"hours": hours, "gpu_hours": n * hours, "dollars": dollars}
