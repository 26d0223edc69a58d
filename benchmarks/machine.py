"""What a GPU machine is and what it reaches: versions, device, the rates of a large matmul and of a large copy.

python -m benchmarks.machine --json machine.json
"""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleave, matmul, spread
from distributed import Distributed
from system.console import CommandLine
from system.errors import command
from system.files import write_json
from training.provenance import device_name, git_version

PACKAGES = ("torch", "triton", "numpy", "pydantic", "pyarrow", "tiktoken", "transformers", "safetensors")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu [default: auto]")
    parser.add_argument("--rounds", type=int, default=100, help="of matmul and copy in turn [default: %(default)s]")
    parser.add_argument("--json", metavar="FILE", help="also write it there")
    return parser.parse_args()


@command
def main() -> None:
    """Print it."""
    args = parse_args()
    with Distributed.start(args.device) as dist:
        found = about(dist.device) | rates(dist, args.rounds)
    for key, value in found.items():
        print(f"{key:20}{value}")
    if args.json:
        write_json(Path(args.json), found)


def about(device: torch.device) -> dict[str, Any]:
    """Names and versions."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": versions,
        "git": git_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def rates(dist: Distributed, rounds: int) -> dict[str, Any]:
    """TFLOP/s of a square matmul of random numbers in the autocast type, GB/s of a copy, bytes read and written counted."""
    mm, flops = matmul(dist.device, dist.dtype)
    source, target = torch.randn(2, 2**29 if dist.device.type == "cuda" else 2**24, device=dist.device)
    seconds = interleave({"matmul": mm, "copy": lambda: target.copy_(source)}, rounds, 5, dist.device)
    mm_ms, copy_ms = (spread(seconds[name], 1)["ms_median"] for name in ("matmul", "copy"))
    return {
        "n": rounds,
        "dtype": str(dist.dtype).removeprefix("torch."),
        "matmul_tflops": round(flops / mm_ms / 1e9, 3),
        "copy_gb_per_second": round(2 * source.nbytes / copy_ms / 1e6, 2),
    }


if __name__ == "__main__":
    main()
