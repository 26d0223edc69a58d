"""What nvidia-smi says of a GPU while something else is measured: clocks, power, temperature, load and memory."""

import statistics
import subprocess
import time
from threading import Thread
from typing import Any

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu", "memory.used")
EVERY_MS = 500


class Sampler:
    """Reads them twice a second, from now to the end of the process; nothing where there is no nvidia-smi."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        words = [f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "--id=0", f"-lms={EVERY_MS}"]
        try:
            self._process = subprocess.Popen(["nvidia-smi", *words], stdout=subprocess.PIPE, text=True)
        except OSError:
            return
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            try:
                self._samples.append((time.monotonic(), [float(word) for word in line.split(",")]))
            except ValueError:  # "[N/A]"
                continue

    def summary(self, since: float) -> dict[str, Any]:
        """Least, median and most of each field in the samples from `since` (time.monotonic) on at which the GPU was busy."""
        busy = [values for when, values in self._samples if when >= since and values[FIELDS.index("utilization.gpu")] >= 50]
        if not busy:
            return {"samples": 0}
        columns = zip(FIELDS, zip(*busy, strict=True), strict=True)
        return {"samples": len(busy)} | {name: [min(v), statistics.median(v), max(v)] for name, v in columns}
