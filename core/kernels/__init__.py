"""Hot spots in fused form; model.py and positional say what they compute, these say how to do it with fewer bytes."""

import os


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for the kernels on a CPU, as NumPy: to check them, hundreds of times too slow to use."""
    return os.environ.get("TRITON_INTERPRET") == "1"
