"""Evaluation: tokens/s of eval_ppl.py's loop beside those of training at the same shape.

python -m lab.bench eval config/tiny.toml --micro_batch=4
"""

import argparse
from typing import Any

from core.distributed import Distributed
from core.measure import interleave, matmul, speedup, spread
from core.sweep.trial import bench_config, bench_data
from lab.bench.trainee import Trainee


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; what is left of the command line is the configuration."""
    add = parser.add_argument
    add("--micro_steps", type=int, default=1, help="micro-batches that each side computes in a round [default: 1]")
    add("--rounds", type=int, default=20, help="rounds that count [default: 20]")
    add("--warmup", type=int, default=3, help="rounds before, which do not count [default: 3]")
    add("--synthetic", action="store_true", help="random tokens instead of the config's shards")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Interleave a training step and the evaluation of as many tokens; prints and returns both and their ratio."""
    cfg = bench_config(rest, args.micro_steps)
    with Distributed.start(cfg.device, cfg.dtype) as dist, bench_data([cfg], args.synthetic) as (cfg,):
        trainee = Trainee(cfg, dist)
        mm, mm_flops = matmul(dist.device, dist.dtype)
        work = {"matmul": mm, "train": trainee.whole, "eval": trainee.evaluate}
        seconds = interleave(work, args.rounds, args.warmup, dist.device)
        found = spread(seconds["eval"], cfg.tokens_per_step)
        mm_rate = mm_flops / spread(seconds["matmul"], 1)["ms_median"] * 1e3
        flops = found["tokens_per_second"] / dist.world_size * cfg.flops_per_token / 3
        result = trainee.describe() | found | {
            "train_tokens_per_second": spread(seconds["train"], cfg.tokens_per_step)["tokens_per_second"],
            "eval_over_train": speedup(seconds["eval"], seconds["train"]),
            "matmul_tflops": round(mm_rate / 1e12, 4),
            "mfu_measured": round(flops / mm_rate, 4),
            "config": cfg.model_dump(exclude={"name", "out_dir"}),
        }  # fmt: skip
        trainee.close()
    if dist.is_main:
        print(f"evaluation {found['tokens_per_second']:,.0f} tokens/s, training {result['train_tokens_per_second']:,.0f}")
        print(f"evaluation ÷ training {result['eval_over_train']:.2f}; {result['mfu_measured']:.1%} of the matmul rate")
    return result
