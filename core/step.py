"""One optimizer step: micro-batches in, new weights and what was seen on the way out."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core.config import Config
from core.data import Batches
from core.distributed import Distributed
from core.guard import Guard
from core.optim import clip_, set_lr


def update(
    step: int, net: nn.Module, optimizer: Optimizer, batches: Batches, guard: Guard, dist: Distributed, cfg: Config
) -> dict[str, float]:
    """Take step `step`; returns the loss, the learning rate and the gradient norm before clipping, the same on every rank."""
    lr = set_lr(optimizer, step, cfg)
    total = forward_backward(net, batches, step, dist)
    norm = clip_(net, cfg.grad_clip)
    loss, grad_norm = torch.stack((total, norm)).tolist()  # the step's one wait for the device
    if guard.passes(step, loss, grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": lr, "grad_norm": grad_norm}


def forward_backward(net: nn.Module, batches: Batches, step: int, dist: Distributed) -> Tensor:
    """Accumulate one step's gradients; returns the true mean loss over its micro-steps and ranks."""
    total = torch.zeros((), device=dist.device)
    for micro in range(batches.grad_accum):
        x_BT, y_BT = batches[step, micro]
        with dist.sync_if(net, micro == batches.grad_accum - 1):
            with dist.autocast():
                loss = net(x_BT, y_BT) / batches.grad_accum
            loss.backward()
        total += loss.detach()
    return dist.mean_(total)
