"""What nvidia-smi says of a GPU while something else is measured: clocks, power, temperature, load and memory."""

import statistics
import subprocess
import time
from threading import Event, Thread
from typing import Any

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu", "memory.used")
EVERY_S = 0.5
BUSY = 50  # percent of utilization.gpu


class Sampler:
    """Asks for them twice a second until it is closed; nothing where there is no nvidia-smi."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        self._closed = Event()
        Thread(target=self._read, daemon=True).start()

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _read(self) -> None:
        query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
        while not self._closed.wait(EVERY_S):
            try:
                said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
                self._samples.append((time.monotonic(), [float(word) for word in said.split(",")]))
            except FileNotFoundError:
                return
            except (OSError, subprocess.SubprocessError, ValueError):  # it is slow, or says [N/A]
                continue

    def summary(self, since: float) -> dict[str, Any]:
        """Least, median and most of each field in the samples from `since` (time.monotonic) on at which the GPU was busy."""
        at = FIELDS.index("utilization.gpu")
        busy = [values for when, values in self._samples if when >= since and values[at] >= BUSY]
        if not busy:
            return {"samples": 0}
        columns = zip(FIELDS, zip(*busy, strict=True), strict=True)
        return {"samples": len(busy)} | {name: [min(v), statistics.median(v), max(v)] for name, v in columns}
