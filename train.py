"""Train one GPT-2 with one positional encoding; all it leaves behind is in its run folder.

    python train.py config/demo.toml config/carope.toml
    torchrun --standalone --nproc_per_node=2 train.py config/small.toml config/carope.toml

The same command, started again after an interruption, goes on from the newest checkpoint.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import sys

from torch import nn

from core.config import Config, load_config
from core.data import Batches, TokenStream, to_batch
from core.distributed import Distributed, check_residual, pick_device
from core.errors import command
from core.fsdp import uncompiled
from core.guard import Guard
from core.initial import load_initial
from core.kernels.support import check_kernel
from core.optim import make_optimizer
from core.replay import Replay
from core.run import Leaving, Run
from core.step import update
from eval_ppl import evaluate
from model import GPT


def train(cfg: Config) -> int:
    """Train to the last step, or until asked to leave; returns the exit code."""
    check_kernel(cfg.kernel, pick_device(cfg.device))
    check_residual(cfg)
    run_type = Run if cfg.replay_step < 0 else Replay
    with Distributed.start(cfg.device, cfg.dtype, cfg.dist_timeout) as dist, run_type(cfg, dist) as run:
        with dist.together():
            batches = Batches(cfg, "train", dist)
            val = TokenStream(cfg.data, "val", cfg.vocab_size)
        model = dist.shard(GPT(cfg), cfg)
        optimizer = make_optimizer(model, cfg)
        guard = Guard(cfg, dist, model, batches)
        start = run.resume(model, optimizer, guard, [batches.stream, val])
        if start == 0 and cfg.init_from:
            with dist.together():
                load_initial(cfg.init_from, model, say=dist.is_main)
        net = dist.wrap(model, cfg)

        for step in run.steps(start):  # one more than there are updates: the last pass evaluates and saves
            if run.eval_due(step):
                validate(net, model, val, step, run)
            if run.save_due(step):
                run.save(step, model, optimizer)
            if run.stopping or step == cfg.steps:
                break
            run.log(step, **update(step, net, optimizer, batches, guard, dist, cfg))
    return run.exit_code


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
    x_BT, _ = to_batch(val.read(0, cfg.block_size + 1), cfg.block_size, dist.device)
    with uncompiled(model):
        health, complaint = model.health(x_BT)
    run.log(step, val_loss=found.nll, val_perplexity=found.perplexity, val_tokens=found.tokens, **health)
    run.warn(step, complaint if step > max(cfg.warmup_steps, cfg.steps // 10) else None)


@command(work_in_files=True)
def main() -> int:
    return train(load_config(sys.argv[1:]))


if __name__ == "__main__":
    main()
