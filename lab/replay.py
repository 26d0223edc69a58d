"""One step of a run once more, micro-step by micro-step: what was in the batch that blew up, and where it began.

    python -m lab.replay runs/small-carope 4711
    torchrun --standalone --nproc_per_node=2 -m lab.replay runs/small-carope 4711 --micro_batch=16

It loads the newest checkpoint at or before the step, takes the steps between, computes the step without taking it, and prints
loss, gradient norm, tokens and the first module that is not finite for each micro-step. The run folder is only read; the run
may be running or finished.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import sys
from pathlib import Path

from core.checkpoint import newest_checkpoint
from core.config import FREE_ON_RESUME, Config, load_config
from core.console import CommandLine, given_path
from core.data import TokenStream
from core.distributed import Distributed
from core.errors import UserError, command
from core.guard import Guard, MicroStep, inspect_step
from core.run import check_all_same, load
from core.sweep.trial import build, take_step


def parse_args(argv: list[str]) -> tuple[int, Config]:
    """The step, and the configuration of the run with what the command line changes of it."""
    parser = CommandLine(__doc__)
    parser.add_argument("run", type=given_path, metavar="RUN", help="run folder")
    parser.add_argument("step", type=int, metavar="STEP", help="of the run, as the error or log.jsonl gives it")
    args, more = parser.parse_known_args(argv)
    folder = Path(args.run).absolute()
    if not (folder / "config.toml").exists():
        raise UserError(f"{args.run}: no run folder, it has no config.toml")
    of_run = [str(folder / "config.toml"), f"--out_dir={folder.parent}", f"--name={folder.name}"]
    before, cfg = dict(load_config(of_run)), load_config([*of_run, *more])
    if other := [key for key, value in cfg if key not in FREE_ON_RESUME and value != before[key]]:
        raise UserError(f"--{other[0]}: the run has {before[other[0]]!r}; with another value it would be another run's step")
    if not 0 <= args.step < cfg.steps:
        raise UserError(f"step {args.step}: the run's steps are 0 to {cfg.steps - 1}")
    return args.step, cfg


def replay(step: int, cfg: Config, dist: Distributed) -> list[MicroStep]:
    """What each micro-step of `step` computes on each rank, in the order of the tokens. Raises UserError as train.py does."""
    batches, model, optimizer = build(cfg, dist)
    guard = Guard(cfg, dist, model, batches)
    with dist.together():
        found = newest_checkpoint(cfg.folder, at_most=step) if dist.is_main else None
        if found:
            check_all_same(found, cfg, [batches.stream, TokenStream(cfg.data, "val", cfg.vocab_size)])
    found = dist.from_main(found)
    with dist.together():
        load(found, model, optimizer, guard, cfg, say=False)
    start = found[1].step if found else 0
    if dist.is_main:
        print(f"{cfg.folder}: from step {start} to step {step}", flush=True)
    net = dist.wrap(model, cfg)
    for earlier in range(start, step):
        take_step(earlier, net, optimizer, batches, guard, dist, cfg)
    return inspect_step(model, batches, step, dist)


def render(step: int, rows: list[MicroStep]) -> str:
    """A line per micro-step and rank: loss, gradient norm, tokens, and the first thing that is not finite."""
    lines = [f"step {step}", f"{'micro-step':>10} {'rank':>5} {'loss':>10} {'grad norm':>10}  batch"]
    for row in rows:
        bad = f"; first not finite: {row.first}" if row.first else ""
        lines.append(f"{row.micro:>10} {row.rank:>5} {row.loss:>10.4f} {row.grad_norm:>10.4f}  {row.tokens}{bad}")
    return "\n".join(lines)


def show(argv: list[str]) -> None:
    """Print the table of the step that `argv` names."""
    step, cfg = parse_args(argv)
    with Distributed.start(cfg.device, cfg.dtype, cfg.dist_timeout) as dist:
        rows = replay(step, cfg, dist)
        if dist.is_main:
            print(render(step, rows))


@command
def main() -> None:
    """Show the step that the command line names."""
    show(sys.argv[1:])


if __name__ == "__main__":
    main()
