"""FSDP2: each rank keeps a shard of weights, gradients and AdamW's averages; a block is whole only while it computes.

torch's `fully_shard` swaps the parameters of a module between shards (DTensors, cut along their first dimension) and the
whole. What is called collective here must be called by every rank, or those that do wait for the others.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(model: Any, device: torch.device) -> None:
    """Cut the parameters of `model`, each of its blocks `h` and then the rest, over all ranks; shards alone stay on `device`.

    Every rank has built the same model in host memory, 4 bytes a parameter; one block at a time passes through the device.
    The rest (embedding, tied head, last norm, shared positions) is whole from the forward pass to the end of the backward.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: these take a second to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here: a forward or backward pass is collective then."""
    return hasattr(model, "set_requires_gradient_sync")


def compile_blocks(model: Any) -> None:
    """Compile what each block computes; FSDP's exchange before and after it, which cannot be compiled, stays around it."""
    for block in model.h:
        block.forward = torch.compile(block.forward, dynamic=False)


def uncompiled(model: nn.Module) -> AbstractContextManager:
    """While entered, what `compile_blocks` compiled runs as it was written: for odd shapes, caches and hooks."""
    return torch.compiler.set_stance("force_eager") if is_sharded(model) else nullcontext()


@contextmanager
def own_gradients(model: Any) -> Iterator[None]:
    """While entered, a backward pass leaves on each rank the whole gradients of its own loss; outside, none are left.

    Of a sharded model the device must hold weights and gradients whole meanwhile, 8 bytes a parameter.
    """
    if not is_sharded(model):
        yield
        return
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)
    try:
        with uncompiled(model):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)
        for module in filter(is_sharded, model.modules()):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """`tensor` as a plain one, whole; collective where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies of `tensors`, whole, in the host memory of the ranks that `keep` them; collective.

    They pass through the device one by one.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full.to("cpu", copy=True)
    return found


def cut(full: Tensor, like: Any) -> Tensor:
    """`full`, which every rank has, sharded as `like` is; `full` itself where `like` is whole. Nothing is sent."""
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    rows, rank = -(-full.size(0) // mesh.size()), mesh.get_local_rank()  # as torch.chunk cuts, and FSDP with it
    part = full[rank * rows : (rank + 1) * rows].to(like.device, copy=True)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
