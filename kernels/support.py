"""Whether Triton kernels can run here. It needs no Triton to be imported."""

import importlib.util
import os

import torch

from errors import UserError

INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for the kernels on a CPU, as NumPy: to check them, hundreds of times too slow to use."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_kernel(kernel: str, device: torch.device) -> None:
    """Raise UserError where `kernel`, the configuration's, is "triton" and that cannot run on `device`."""
    if kernel != "triton":
        return
    if not INSTALLED:
        raise UserError("kernel = 'triton': Triton is not installed (pip install triton, Linux only); --kernel=auto does without")
    if device.type != "cuda" and not interpreted():
        raise UserError(
            f"kernel = 'triton': needs a CUDA device, and this run is on {device.type!r}; --kernel=auto works everywhere, "
            "TRITON_INTERPRET=1 in the environment runs the kernels on a CPU, very slowly"
        )
