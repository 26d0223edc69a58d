"""What a step is made of: gradients over micro-steps, their norm, AdamW and its schedule as the paper has them."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from core.config import Config
from core.data import Batches
from core.distributed import Distributed
from core.fsdp import whole


def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """AdamW; weight decay on tensors of two or more dimensions only. Every parameter is in exactly one group."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up to cfg.lr over warmup_steps, then a cosine to cfg.min_lr at cfg.steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.lr - cfg.min_lr)


def set_lr(optimizer: torch.optim.Optimizer, step: int, cfg: Config) -> float:
    """Give every group the learning rate of `step`; returns it."""
    lr = learning_rate(step, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def forward_backward(net: nn.Module, batches: Batches, step: int, dist: Distributed) -> Tensor:
    """Accumulate the gradients of `step`; returns the true mean loss over its micro-steps and ranks."""
    total = torch.zeros((), device=dist.device)
    for micro in range(batches.grad_accum):
        x_BT, y_BT = batches[step, micro]
        with dist.sync_if(net, micro == batches.grad_accum - 1):
            with dist.autocast():
                loss = net(x_BT, y_BT) / batches.grad_accum
            loss.backward()
        total += loss.detach()
    return dist.mean_(total)


def clip_(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` where theirs is larger; returns their norm, the same on every rank."""
    norm = whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
