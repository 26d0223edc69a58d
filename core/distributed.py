"""Ranks, devices and number formats: everything about where a run computes, nothing about what it computes.

One process is world size 1; under torchrun the process group is NCCL on GPUs and gloo on CPUs.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import EXIT_LOST_RANK, UserError, end_at_once
from core.fsdp import compile_blocks, is_sharded, shard
from core.host import ranks
from core.rendezvous import meet
from core.watchdog import Watchdog, follow_parent

# Dense bf16 TFLOP/s by vendor data sheet; the first name found in the device's name counts
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "GH200": 989.4, "H200": 989.4, "H100": 989.4,
    "H800": 989.4, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125,
    "A40": 149.7, "A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


Module = TypeVar("Module", bound=nn.Module)


# Process groups that were left. DDP's reducer, often the last to hold one, would wait with Python's lock for gloo's threads to
# end, and one of these for the lock to let go of a tensor (torch 2.13): a training would hang at its end, now and then.
_LEFT: list[Any] = []


class Distributed:
    """This process among all: `rank`, `local_rank`, `world_size`, `device`, and `dtype`, the autocast type."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.rank, self.local_rank, self.world_size = ranks()
        self.is_main = self.rank == 0
        self._watchdog: Watchdog | None = None
        self._is_sharding = False
        self._place = "start"

    @classmethod
    def start(cls, device: str = "auto", dtype: str = "auto", timeout: float = 600.0) -> "Distributed":
        """Join the process group, where torchrun started this process.

        `timeout` is the longest in seconds that a rank waits for another. Raises UserError for a device that is not there.
        """
        follow_parent()
        chosen = pick_device(device)
        self = cls(chosen, pick_dtype(dtype, chosen))
        on_gpu = chosen.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(chosen)
            # No TF32: under bf16 autocast the one matmul left in fp32 is CARoPE's W, whose digits add up along the phases
            torch.set_float32_matmul_precision("highest")
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            backstop = timedelta(seconds=timeout + 30)  # the watchdog comes first, it knows which rank is late
            store, rank, world_size, start = meet(timeout)
            end_at_once()
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=backstop,
                device_id=chosen if on_gpu else None,
            )
            self._watchdog = Watchdog(self.rank, self.world_size, timeout, start)
        return self

    def __enter__(self) -> "Distributed":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Leave the process group; where an exchange failed because a rank is gone, with a line that names the rank."""
        try:
            if isinstance(error, RuntimeError):
                self._explain(error)
        finally:
            if self._watchdog:
                self._watchdog.close()
        if dist.is_initialized() and error is None:  # else the others may not come along; the process ends anyway
            _LEFT.append(dist.group.WORLD)
            dist.destroy_process_group()

    def _explain(self, error: RuntimeError) -> None:
        if not self._watchdog or not (lost := self._watchdog.lost()):
            return
        if self._watchdog.is_first_to_say(lost):
            reason = str(error).strip().splitlines()[-1]
            print(f"error: {lost}; the same command goes on from the last checkpoint ({reason})", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_LOST_RANK)

    def at(self, place: str) -> None:
        """Tell the watchdog, and through it the other ranks, how far this one is; all ranks pass the same places."""
        self._place = place
        if self._watchdog:
            self._watchdog.at(place)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A UserError on one rank is raised on all, so that none is left waiting; every rank must come here."""
        mine = None
        try:
            yield
        except UserError as error:
            mine = str(error)
        if first := next(filter(None, self.gather(mine)), None):
            raise UserError(first)

    def shard(self, model: Module, cfg: Any) -> Module:
        """`model` on this rank's device, before an optimizer is made of its parameters: all of it, or with FSDP a shard.

        A process alone, without torchrun, has nobody to share with and keeps all.
        """
        self._is_sharding = cfg.parallel == "fsdp" and dist.is_initialized()
        if self._is_sharding:
            shard(model, self.device)
            return model
        return model.to(self.device)

    def compiles(self, cfg: Any) -> bool:
        """Whether cfg.compile means torch.compile on this device."""
        return cfg.compile == "on" or (cfg.compile == "auto" and self.device.type == "cuda")

    def wrap(self, model: nn.Module, cfg: Any, **ddp: Any) -> nn.Module:
        """`model` as the loop calls it: compiled where cfg.compile says so, DDP (options: `ddp`) where ranks have it whole."""
        net: Any = model
        if self.compiles(cfg) and self._is_sharding:
            compile_blocks(model)
        elif self.compiles(cfg):
            # A bench holds a model for each encoding, each compiled for training and for evaluation; past the limit, which
            # comes as 8 of all models together, torch goes on uncompiled
            torch._dynamo.config.recompile_limit = 64
            net = torch.compile(net, dynamic=False)
        if dist.is_initialized() and not self._is_sharding:
            ids = [self.device.index] if self.device.type == "cuda" else None
            net = DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True, **ddp)
        return net

    def sync_if(self, net: Any, last: bool) -> AbstractContextManager:
        """DDP and FSDP exchange gradients on the last micro-step only; nothing to do without them."""
        if isinstance(net, DistributedDataParallel):
            return nullcontext() if last else net.no_sync()
        if is_sharded(net):
            # Fewer bytes to send, but up to the last micro-step each rank has the gradients whole, 4 bytes a parameter
            net.set_requires_gradient_sync(last)
        return nullcontext()

    def autocast(self) -> AbstractContextManager:
        """Matmuls in `dtype`; a no-op for float32."""
        # A cache of the cast weights saves nothing, each is used once, and would hold what FSDP has just let go
        keep = not self._is_sharding
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32, cache_enabled=keep)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum of `x` over ranks, in place."""
        if dist.is_initialized():
            if self._watchdog:
                self._watchdog.at(f"{self._place}, then waiting for the other ranks")
            dist.all_reduce(x)
        return x

    def mean_(self, x: Tensor) -> Tensor:
        """Mean of `x` over ranks, in place."""
        return self.sum_(x).div_(self.world_size)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; every rank must ask."""
        if not dist.is_initialized():
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)))

    def gather(self, value: Any) -> list[Any]:
        """`value` (anything picklable) of every rank, on every rank."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` (anything picklable) on every rank."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def peak_flops(self) -> float | None:
        """Dense FLOP/s of this device in `dtype` by its data sheet; None where it is not known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        device_name = torch.cuda.get_device_name(self.device)
        return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of device memory on a GPU (Apple's: held now), of resident memory on a CPU (Windows: 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # which the allocator keeps for itself
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(wanted: str) -> torch.device:
    """The device of this process for "cuda", "mps", "cpu", or "auto": the first of them that is there and can be used."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    _, index, world_size = ranks()
    if wanted == "mps" and world_size > 1:
        raise UserError(f"device = 'mps': one process can use it, not {world_size}; leave out torchrun, or --device=cpu")
    if wanted == "auto":
        wanted = "cuda" if has_cuda else "mps" if has_mps and world_size == 1 else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not {"cuda": has_cuda, "mps": has_mps}[wanted]:
        name = {"cuda": "CUDA device", "mps": "Apple GPU"}[wanted]
        raise UserError(f"device = {wanted!r}: this machine has no {name} that torch can use; --device=cpu works everywhere")
    if wanted == "mps":
        return torch.device("mps")
    count = torch.cuda.device_count()
    if index >= count:
        message = f"local rank {index} has no GPU, this node has {count}; --nproc_per_node={count} is the most"
        raise UserError(message, alone=index == count)  # local rank 0 has one and does not come here: the first without says it
    return torch.device("cuda", index)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The autocast type of "auto", "bfloat16" or "float32" on `device`."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if has_bf16(device) else torch.float32


def format_name(dtype: torch.dtype) -> Literal["bfloat16", "float32"]:
    """The name of an autocast type, as options and records have it."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def check_residual(cfg: Any) -> None:
    """Raise UserError where cfg.residual is "bfloat16" and this run's matmuls would be float32."""
    device = pick_device(cfg.device)
    if cfg.residual == "bfloat16" and pick_dtype(cfg.dtype, device) != torch.bfloat16:
        raise UserError(
            f"residual = 'bfloat16': this run computes in float32 (dtype = {cfg.dtype!r} on {device.type!r}), so it would save "
            "nothing; --dtype=bfloat16 or --residual=float32"
        )


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware (GPUs from Ampere; CPUs with AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return False  # from the M2 on it does; --dtype=bfloat16 says so
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe)


def local_and_eager(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What `Distributed.wrap` returned without DDP, and without compilation too."""
    local = net.module if isinstance(net, DistributedDataParallel) else net
    return local, getattr(local, "_orig_mod", local)
