"""decode.cpp, compiled where it is needed for the processor that is there."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SOURCE = Path(__file__).with_name("decode.cpp")
# Linked with nothing: its threads are to be torch's own. A second OpenMP in the process would have others, in the way of these
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-exceptions", "-shared", "-fPIC", "-nodefaultlibs")
LANES, WIDTH = 16, 32  # as there

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_long


@functools.cache
def native() -> Any:
    """Its functions `linear` and `attend`; None without a compiler, or where torch's OpenMP is not one that this one knows.

    It takes a third of a second, once in a process.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or compiler is None or not SOURCE.exists():
        return None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "decode.so"
        try:
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(file)], capture_output=True, check=True)
            library = ctypes.CDLL(str(file))
        except (OSError, subprocess.SubprocessError):
            return None
    library.linear.argtypes, library.linear.restype = [_POINTER] * 4 + [_INTEGER] * 3, None
    library.attend.argtypes, library.attend.restype = [_POINTER] * 5 + [_INTEGER] * 4 + [ctypes.c_float], None
    return library
