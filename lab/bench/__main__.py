"""Speed and memory, measured: each candidate interleaved with the others, medians and their spread, ratios within one run.

    python -m lab.bench train config/tiny.toml --micro_batch=4 --encodings rope carope
    python -m lab.bench train config/small.toml --synthetic --vs ../nanoGPT
    python -m lab.bench decode config/small.toml
    torchrun --standalone --nproc_per_node=2 -m lab.bench overlap config/demo.toml --micro_batch=16

`lab.bench COMMAND --help` says what each measures. The last line printed is one JSON object.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from core.console import CommandLine, docstring_of, new_file, this_command
from core.distributed import pick_device
from core.errors import command
from core.files import write_json
from core.provenance import device_name, git_version

COMMANDS = ("machine", "train", "eval", "decode", "scaling", "overlap")


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the configuration."""
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in [name for name in COMMANDS if name in argv[:1]] or COMMANDS:
        module = importlib.import_module(f"lab.bench.{name}")
        doc = docstring_of(str(module.__file__))
        sub = commands.add_parser(
            name,
            help=doc.splitlines()[0].replace("%", "%%"),
            description=doc,
        )
        module.add_arguments(sub)
        sub.add_argument("--json", type=new_file, metavar="FILE", help="also write the result there")
        sub.set_defaults(module=module)
    return parser.parse_known_args(argv)


def conditions() -> dict[str, Any]:
    """What stands beside every figure: command, commit, versions, machine."""
    n_local = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", f"--nproc_per_node={n_local}"] if n_local else ["python"]
    return {
        "command": shlex.join([*launcher, *this_command()]),
        "git": git_version(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": device_name(pick_device("auto")),
        "threads": torch.get_num_threads(),
        "gpus": gpu_state(),
    }


def gpu_state() -> list[str] | None:
    """Clocks, power and temperature of each GPU as nvidia-smi gives them; None where there is none."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None


@command
def main() -> None:
    """Run the benchmark the command line names; the last line is its result. Under torchrun rank 0 prints it."""
    args, rest = parse_args(sys.argv[1:])
    beside = conditions()
    is_main = os.environ.get("RANK", "0") == "0"

    def keep(result: dict[str, Any]) -> None:
        if args.json and is_main:
            write_json(Path(args.json), beside | result)

    args.keep = keep  # for results that are not complete yet
    result = args.module.run(args, rest)
    keep(result)
    if is_main:
        print(json.dumps(beside | result))


if __name__ == "__main__":
    main()
