"""What a training step would take on 1 to 64 GPUs, by parts, and a run in hours and dollars: predicted, nothing is measured.

    python -m lab.bench scaling config/small.toml config/carope.toml --gpus 1 2 8 --dollars 3

Times are in milliseconds a step, memory is that of a GPU; docs/scaling.md has the formulas, and says what is assumed. The rate
is that of results/gpu-bench.json where it has the configuration, else 40 % of an H100's peak, unless --tflops says another.
"""

import argparse
from dataclasses import asdict, replace
from typing import Any

from core.config import load_config
from core.errors import UserError
from core.sweep.scaling import Machine, describe, machine_for, predict, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; the configuration's own go beside them."""
    add, usual = parser.add_argument, Machine()
    add("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], metavar="N", help="[default: 1 2 4 8 16 32 64]")
    add("--gpus_per_node", type=int, default=usual.gpus_per_node, metavar="N", help="[default: %(default)s]")
    add("--tflops", type=float, help="rate of each GPU in forward and backward, TFLOP/s")
    add("--nvlink", type=float, default=usual.nvlink / 1e9, help="GB/s per GPU and direction in a node [default: %(default)s]")
    add(
        "--network",
        type=float,
        default=usual.network / 1e9,
        help="GB/s per GPU and direction between nodes [default: %(default)s]",
    )
    add(
        "--efficiency", type=float, default=usual.efficiency, help="share of a bandwidth that is reached [default: %(default)s]"
    )
    add("--dollars", type=float, default=usual.dollars, help="price of a GPU-hour [default: %(default)s, an assumption]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Print the table; returns the predictions. Raises UserError for numbers of GPUs that cannot be."""
    for name in ("gpus_per_node", "tflops", "nvlink", "network", "efficiency", "dollars"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name} = {value}: must be more than 0")
    cfg = load_config(rest)
    machine = replace(
        machine_for(cfg),
        gpus_per_node=args.gpus_per_node,
        nvlink=args.nvlink * 1e9,
        network=args.network * 1e9,
        efficiency=args.efficiency,
        dollars=args.dollars,
    )
    if args.tflops:
        machine = replace(machine, flops=args.tflops * 1e12, measured_on="")
    predictions = [predict(cfg, gpus, machine) for gpus in args.gpus]
    print(f"{cfg.name}: {describe([machine])}\n\n{render(predictions)}")
    derived = ("step", "tokens_per_second", "efficiency", "hours", "dollars")
    rows = [asdict(p) | {name: getattr(p, name) for name in derived} for p in predictions]
    return {"config": cfg.model_dump(), "machine": asdict(machine), "predictions": rows}
