"""Train one GPT-2 with one positional encoding; all it leaves behind is in its run folder.

    python train.py config/demo.toml config/carope.toml
    torchrun --standalone --nproc_per_node=2 train.py config/small.toml config/carope.toml

The same command, started again after an interruption, goes on from the newest checkpoint.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import sys

import torch
from torch import nn

from core.config import Config, load_config
from core.data import Batches, TokenStream, to_ids
from core.distributed import Distributed, check_residual, pick_device
from core.errors import command
from core.evaluate import evaluate
from core.fsdp import uncompiled
from core.guard import Guard
from core.kernels.support import check_kernel
from core.optim import clip_, forward_backward, make_optimizer, set_lr
from core.run import Leaving, Run
from model import GPT


def train(cfg: Config) -> int:
    """Train to the last step, or until asked to leave; returns the exit code."""
    check_kernel(cfg.kernel, pick_device(cfg.device))
    check_residual(cfg)
    with Distributed.start(cfg.device, cfg.dtype, cfg.dist_timeout) as dist, Run(cfg, dist) as run:
        with dist.together():
            batches = Batches(cfg, "train", dist)
            val = TokenStream(cfg.data, "val", cfg.vocab_size)
        model = dist.shard(GPT(cfg), cfg)
        optimizer = make_optimizer(model, cfg)
        guard = Guard(cfg, dist, model, batches)
        start = run.resume(model, optimizer, guard, [batches.stream, val])
        net = dist.wrap(model, cfg)

        for step in run.steps(start):  # one more than there are updates: the last pass evaluates and saves
            if run.eval_due(step):
                validate(net, model, val, step, run)
            last = run.asked_to_leave() or step == cfg.steps
            if run.save_due(step, last):
                run.save(step, model, optimizer, guard, wait=last)
            if last:
                break
            lr = set_lr(optimizer, step, cfg)
            total = forward_backward(net, batches, step, dist)
            norm = clip_(net, cfg.grad_clip)
            loss, grad_norm = torch.stack((total, norm)).tolist()  # the step's one wait for the device
            if guard.passes(step, loss, grad_norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.log(step, loss=loss, lr=lr, grad_norm=grad_norm)
        return run.exit_code()


def validate(net: nn.Module, model: GPT, val: TokenStream, step: int, run: Run) -> None:
    """Log loss and perplexity on the first eval_tokens of the evaluation set, the same for every run; on all of it at the end.

    Asked to leave, it does without: the continued run makes up for it.
    """
    cfg, dist = run.cfg, run.dist
    n_tokens = cfg.final_eval_tokens if step == cfg.steps else cfg.eval_tokens
    try:
        found = evaluate(
            net, val, cfg.block_size, cfg.micro_batch, dist, n_tokens, progress=dist.is_main, before_each=run.leave_if_asked
        )
    except Leaving:
        return
    x_T = to_ids(val.read(0, cfg.block_size), dist.device).to(dist.device)
    with uncompiled(model):
        health, complaint = model.health(x_T[None])
    run.log(step, val_loss=found.nll, val_perplexity=found.perplexity, val_tokens=found.tokens, **health)
    run.warn(step, complaint if step > max(cfg.warmup_steps, cfg.steps // 10) else None)


@command(work_in_files=True)
def main() -> int:
    return train(load_config(sys.argv[1:]))


if __name__ == "__main__":
    main()
