"""What torch makes of a host: threads, memory, fallbacks. Import it before torch, which reads these settings when it comes.

What the environment says already is left as it is.
"""

import ctypes
import os
from contextlib import suppress

# On a CPU that others use too, threads that spin for each other long hold up each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Tensors of hundreds of megabytes come and go with every step. As glibc comes, each is mapped anew, page by page of 4 KiB, and
# the kernel clears every one: half of a training step's time. Here they take pages of 2 MiB, and keep what was freed.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# What Apple's GPUs cannot do yet (comrope's matrix exponential) the CPU does for them.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep freed memory for the next tensor; nothing where there is no glibc."""
    with suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


if not any(name.startswith("MALLOC_") for name in os.environ):
    keep_freed_memory()
