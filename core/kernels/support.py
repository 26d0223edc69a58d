"""Which Triton kernels can run here. It needs no Triton to be imported."""

import importlib.util
import os
from typing import Any

import torch

from core.errors import UserError

INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for the kernels on a CPU, as NumPy: to check them, hundreds of times too slow to use."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_kernel(kernel: str, device: torch.device) -> None:
    """Raise UserError where `kernel`, the configuration's, is "triton" and that cannot run on `device`."""
    if kernel != "triton":
        return
    if not INSTALLED:
        raise UserError("kernel = 'triton': Triton is not installed (pip install triton, on Linux); --kernel=auto does without")
    if device.type != "cuda" and not interpreted():
        raise UserError(
            f"kernel = 'triton': needs a CUDA device, and this run is on {device.type!r}; --kernel=auto works everywhere, "
            "TRITON_INTERPRET=1 in the environment runs the kernels on a CPU, very slowly"
        )


def rotation_kernel(kernel: str) -> Any:
    """core.kernels.rotary.Rotation where the configuration's `kernel` wants it; else None.

    "auto" wants it where there is a CUDA device: on an H100 it makes GPT-Small's step 6 % shorter with RoPE and 11 % with
    CARoPE (results/gpu-bench-h100.json). None without Triton, too: what was trained with a kernel is evaluated anywhere.
    """
    wanted = kernel == "triton" or (kernel == "auto" and torch.cuda.is_available() and not interpreted())
    if not wanted or not INSTALLED:
        return None
    from core.kernels.rotary import Rotation

    return Rotation


def key_bias_kernel(device: torch.device) -> Any:
    """core.kernels.key_bias_tiles.gradient where it can run; else None."""
    if not INSTALLED or not (device.type == "cuda" or interpreted()):
        return None
    from core.kernels.key_bias_tiles import gradient

    return gradient


def cross_entropy_kernel(device: torch.device) -> Any:
    """core.kernels.cross_entropy_tiles.loss_and_grad_ where it can run; else None."""
    if not INSTALLED or device.type != "cuda":
        return None
    from core.kernels.cross_entropy_tiles import loss_and_grad_

    return loss_and_grad_
