"""Ceilings of a machine: the rates of a large matmul and of a large copy, with the versions of its packages and its GPU.

python -m lab.bench machine
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from core.distributed import Distributed
from core.errors import UserError
from core.measure import interleave, matmul, spread

PACKAGES = ("torch", "triton", "numpy", "pydantic", "pyarrow", "tiktoken", "transformers", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; it takes no configuration."""
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"], help="[default: auto]")
    parser.add_argument("--rounds", type=int, default=100, help="of matmul and copy in turn [default: %(default)s]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Print and return TFLOP/s of a square matmul in the autocast type and GB/s, read and written, of a copy."""
    if rest:
        raise UserError(f"{rest[0]}: lab.bench machine has no such option; --help lists them")
    dist = Distributed.start(args.device)
    mm, flops = matmul(dist.device, dist.dtype)
    source, target = torch.randn(2, 2**29 if dist.device.type == "cuda" else 2**24, device=dist.device)
    seconds = interleave({"matmul": mm, "copy": lambda: target.copy_(source)}, args.rounds, 5, dist.device)
    mm_ms, copy_ms = (spread(seconds[name], 1)["ms_median"] for name in ("matmul", "copy"))
    found = about(dist.device) | {
        "n": args.rounds,
        "dtype": str(dist.dtype).removeprefix("torch."),
        "matmul_tflops": round(flops / mm_ms / 1e9, 3),
        "copy_gb_per_second": round(2 * source.nbytes / copy_ms / 1e6, 2),
    }
    for key, value in found.items():
        print(f"{key:20}{value}")
    return found


def about(device: Any) -> dict[str, Any]:
    """Versions of packages, null where one is not there, and what CUDA says of its device and itself."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    if device.type != "cuda":
        return {"versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "versions": versions,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
