"""Train one GPT-2 with one positional encoding; all it leaves behind is in its run folder.

    python train.py config/demo.toml config/carope.toml
    torchrun --standalone --nproc_per_node=2 train.py config/small.toml config/carope.toml

The same command, started again after an interruption, goes on from the newest checkpoint.
"""

import math
import sys

from config import Config, load_config

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # torch takes seconds to import, help should not
    load_config(sys.argv[1:])

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from data import Batches, TokenStream
from distributed import Distributed
from errors import command
from eval_ppl import evaluate
from model import GPT
from run import Run


def train(cfg: Config) -> int:
    """Train to the last step, or until asked to leave; returns the exit code."""
    dist = Distributed.start(cfg.device, cfg.dtype)
    run = Run(cfg, dist)
    batches = Batches(cfg, "train", dist)
    val = TokenStream(cfg.data, "val", cfg.vocab_size)
    model = GPT(cfg).to(dist.device)
    optimizer = make_optimizer(model, cfg)
    start = run.resume(model, optimizer, batches.stream)
    net = dist.wrap(model, cfg)

    for step in run.steps(start):  # one more than there are updates: the last pass evaluates and saves
        if run.eval_due(step):
            run.log(step, **validate(net, val, cfg, dist, last=step == cfg.steps))
        if run.save_due(step):
            run.save(step, model, optimizer)
        if run.stopping or step == cfg.steps:
            break
        lr = set_lr(optimizer, step, cfg)
        loss = forward_backward(net, batches, step, dist)
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip)
        run.guard(step, loss, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=loss.item(), lr=lr, grad_norm=norm.item())

    code = run.close()
    dist.close()
    return code


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


def validate(net: nn.Module, val: TokenStream, cfg: Config, dist: Distributed, last: bool) -> dict[str, float]:
    """Loss and perplexity on the first eval_tokens of the evaluation set, the same for every run; on all of it at the end."""
    n_tokens = cfg.final_eval_tokens if last else cfg.eval_tokens
    found = evaluate(net, val, cfg.block_size, cfg.micro_batch, dist, n_tokens, progress=dist.is_main)
    return {"val_loss": found.nll, "val_perplexity": found.perplexity, "val_tokens": found.tokens}


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


@command
def main() -> int:
    return train(load_config(sys.argv[1:]))


if __name__ == "__main__":
    main()
