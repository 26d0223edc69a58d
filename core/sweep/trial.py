"""The first steps of a run, made of the parts that train.py makes: do they fit, do the ranks agree, how fast are they?

And with one of the runs: does a checkpoint bring everything back?
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core.checkpoint import (
    RNG,
    CheckpointWriter,
    State,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    optimizer_tensors,
)
from core.config import Config, load_config
from core.data import Batches
from core.distributed import Distributed, check_residual, peak_memory, pick_dtype
from core.errors import UserError
from core.fsdp import gather, is_sharded, whole
from core.guard import Guard
from core.host import ranks
from core.kernels.support import check_kernel
from core.measure import interleave, spread
from core.optim import clip_, forward_backward, make_optimizer, set_lr
from model import GPT
from text.shard_writer import write_shard

T = TypeVar("T")


class Alone(Distributed):
    """This rank of `dist`, which exchanges neither gradients nor losses."""

    def __init__(self, dist: Distributed) -> None:
        self.__dict__.update(vars(dist))

    def sync_if(self, net: Any, last: bool) -> Any:
        """No exchange on the last micro-step either."""
        return super().sync_if(net, False)

    def mean_(self, x: Tensor) -> Tensor:
        """`x`, this rank's own."""
        return x


def take_steps(cfg: Config, dist: Distributed, timed: int, folder: Path | None) -> dict[str, Any]:
    """Take `timed` steps of `cfg` and three before; in `folder`, if there is one, write a checkpoint and resume from it.

    `problem` says in words where the ranks disagree or the checkpoint brings back something else. Raises UserError, on all
    ranks, where one has not the memory, a loss is not finite, the data cannot be read or the checkpoint not be written. (With
    FSDP the others may wait for the rank that has not the memory, until the watchdog ends them.)
    """
    dist.dtype = pick_dtype(cfg.dtype, dist.device)  # the run's own, as in a process of its own
    if dist.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(dist.device)
    begin = time.perf_counter()
    batches, model, optimizer = together(dist, lambda: build(cfg, dist))
    guard = Guard(cfg, dist, model, batches)
    net = together(dist, lambda: dist.wrap(model, cfg))
    losses: list[float] = []

    def step() -> None:
        losses.append(take_step(len(losses), net, optimizer, batches, guard, dist, cfg)["loss"])

    def careful_step() -> None:
        # A rank that runs out of memory while the others wait for its gradients would leave them waiting: each by itself first
        if not is_sharded(model):  # what FSDP computes is an exchange
            together(dist, lambda: forward_backward(net, batches, len(losses), Alone(dist)))
            optimizer.zero_grad(set_to_none=True)
        together(dist, step)

    careful_step()
    first = time.perf_counter() - begin
    careful_step()  # now beside AdamW's averages, which the first step has made
    seconds = interleave({"step": step}, timed, 1, dist.device)["step"]
    found = spread(seconds, cfg.tokens_per_step) | {
        "world_size": dist.world_size,
        "flops_per_token": cfg.flops_per_token,
        "first_step_seconds": first,
        "peak_memory_bytes": max(dist.gather(peak_memory(dist.device))),
        "losses": losses,
    }
    seen = dist.gather({"losses": losses, "weights": bit_sums(model)})
    if wrong := [what for what in seen[0] if any(one[what] != seen[0][what] for one in seen)]:
        return found | {"problem": f"the ranks do not agree on {' and '.join(wrong)} after {len(losses)} steps"}
    return found | (resume(cfg, dist, model, optimizer, folder) if folder else {})


def build(cfg: Config, dist: Distributed) -> tuple[Batches, GPT, Optimizer]:
    """Data, model and optimizer as train.py makes them, but for --init_from."""
    check_kernel(cfg.kernel, dist.device)
    check_residual(cfg)
    batches = Batches(cfg, "train", dist)
    model = dist.shard(GPT(cfg), cfg)
    return batches, model, make_optimizer(model, cfg)


def take_step(
    step: int, net: nn.Module, optimizer: Optimizer, batches: Batches, guard: Guard, dist: Distributed, cfg: Config
) -> dict[str, float]:
    """A step as it stands in train.py's loop, for what takes steps and keeps no run; returns what the loop would log."""
    lr = set_lr(optimizer, step, cfg)
    total = forward_backward(net, batches, step, dist)
    norm = clip_(net, cfg.grad_clip)
    loss, grad_norm = torch.stack((total, norm)).tolist()
    if guard.passes(step, loss, grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": lr, "grad_norm": grad_norm}


def together(dist: Distributed, act: Callable[[], T]) -> T:
    """What `act` returns. Raises UserError on all ranks where it does, or runs out of memory, on one."""
    found, why = None, None
    try:
        found = act()
    except torch.OutOfMemoryError as error:
        why = f"does not fit into the memory of rank {dist.rank} ({first_line(error)}); a smaller --micro_batch "
        why += "or --activation_checkpointing=true takes less"
    except UserError as error:
        why = str(error)
    with dist.together():  # not before the error is gone, and with it what its frames hold of the memory
        if why:
            raise UserError(why)
    return found  # type: ignore[return-value]


def first_line(error: BaseException) -> str:
    """What torch says of an error before it goes into details."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def bit_sums(model: nn.Module) -> list[int]:
    """Of each parameter the sum of its bits as integers, the same on two ranks if the parameters are."""
    return torch.stack([whole(p.detach()).view(torch.int32).sum() for p in model.parameters()]).tolist()


def resume(cfg: Config, dist: Distributed, model: GPT, optimizer: Optimizer, folder: Path) -> dict[str, Any]:
    """Write a checkpoint below `folder`, forget weights and averages, load them as a run does: equal to the last bit?"""

    def everything() -> dict[str, Tensor]:
        return gather({**model.state_dict(), **optimizer_tensors(model, optimizer)}, keep=True)

    before, begin = everything(), time.perf_counter()
    state = State(
        step=0, tokens=0, config=cfg.model_dump(), tokenizer="", train_tokens=0, shards=[], val_loss=None, log_bytes=0, git=None
    )
    writer = CheckpointWriter(folder, cfg.keep_checkpoints, cfg.async_checkpoint)
    try:
        with dist.together():
            writer.save(model, optimizer, state if dist.is_main else None)
            writer.wait()
    finally:
        writer.close()
    written = time.perf_counter()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer.state.clear()
    found = dist.from_main(newest_checkpoint(folder) if dist.is_main else None)
    with dist.together():
        if not found:
            raise UserError(f"{folder}: the checkpoint written there is damaged; is the disk sound?")
        load_weights(found[0], model)
        load_optimizer(found[0], model, optimizer)
    loaded, after = time.perf_counter(), everything()
    same = before.keys() == after.keys() and all(
        torch.equal(before[name], after[name])
        for name in before
        if not name.startswith(RNG)  # all ranks have rank 0's now
    )
    times = {"write_seconds": written - begin, "load_seconds": loaded - written}
    about = {"checkpoint": times | {"bytes": sum(tensor.nbytes for tensor in before.values())}}
    return about | ({"problem": "a checkpoint brings back other weights or averages"} if dist.any(not same) else {})


def bench_config(words: list[str], micro_steps: int, candidate: str = "") -> Config:
    """The configuration of `words`, whose step is `micro_steps` micro-batches on each device.

    A `candidate` is an encoding with options and files on top of `words`: rope,kernel=triton or rope,config/tiny.toml.
    """
    encoding, *more = candidate.split(",")
    options = [*([f"--encoding={encoding}"] if encoding else []), *(f"--{one}" for one in more if not one.endswith(".toml"))]
    cfg = load_config([*words, *(one for one in more if one.endswith(".toml")), *options])
    tokens = micro_steps * cfg.micro_batch * cfg.block_size * ranks().world_size
    return cfg.model_copy(update={"tokens_per_step": tokens})


@contextmanager
def bench_data(cfgs: Sequence[Config], synthetic: bool) -> Iterator[list[Config]]:
    """`cfgs`, with random tokens for their data where `synthetic`; they are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        if synthetic:
            n, ids = max(1 << 20, *(2 * cfg.tokens_per_step for cfg in cfgs)), min(50257, *(cfg.vocab_size for cfg in cfgs))
            rng = np.random.default_rng(1)
            for name in ("val_000000.bin", "train_000001.bin"):
                write_shard(Path(folder) / name, rng.integers(0, ids, n, dtype=np.uint16))
        yield [cfg.model_copy(update={"data": folder}) if synthetic else cfg for cfg in cfgs]
