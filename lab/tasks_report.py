"""What runs of several encodings and seeds say of the tasks together: means over seeds, a table, the same figure.

python -m lab.tasks_report    puts results/tasks-cpu.json into docs/findings.md
"""

import json
from typing import Any

from core.files import ROOT
from core.tables import mean_and_error, plus_minus, table, write_blocks
from lab.analyze.tasks import draw
from lab.sweep_report import PAGE

RESULTS = ROOT / "results/tasks-cpu.json"


def merge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of an encoding as one: accuracies are means over its seeds, errors those of the means (of a single run, its own)."""
    merged = []
    for encoding in dict.fromkeys(one["encoding"] for one in found["runs"]):
        runs = [one for one in found["runs"] if one["encoding"] == encoding]
        results = []
        for same in zip(*(one["results"] for one in runs), strict=True):
            record = {key: same[0][key] for key in ("task", "factor", "chance")}
            known = [r["accuracy"] for r in same if r["accuracy"] is not None]
            accuracy, stderr = mean_and_error(known) if known else (None, None)
            results.append(record | {"accuracy": accuracy, "stderr": stderr if len(known) > 1 else same[0]["stderr"]})
        merged.append({"run": encoding, "encoding": encoding, "n": len(runs), "results": results})
    return merged


def render(found: dict[str, Any]) -> str:
    """A row per task and encoding, a column per multiple of the training length."""
    merged = merge(found)
    factors = list(dict.fromkeys(r["factor"] for r in merged[0]["results"]))
    rows = []
    for task, chance in dict.fromkeys((r["task"], r["chance"]) for r in merged[0]["results"]):
        for i, one in enumerate(merged):
            row = [r for r in one["results"] if r["task"] == task]
            cells = [plus_minus(r["accuracy"], r["stderr"], ".2f") for r in row]
            title = f"{task} (a guess: {chance:.2f})" if i == 0 else ""
            rows.append([title, one["encoding"], *cells, one["n"]])
    examples = max(r["n"] for one in found["runs"] for r in one["results"])
    text = table([f"accuracy at × {found['runs'][0]['block_size']}", "", *factors, "n"], rows)
    return f"{text}\nMean ± standard error over n runs, of a single run over its {examples} examples.\n"


def main() -> None:
    """Put table and figure into docs/."""
    found = json.loads(RESULTS.read_text())
    write_blocks(PAGE, {"tasks": render(found)})
    merged = merge(found)
    draw(merged, list(dict.fromkeys(r["task"] for r in merged[0]["results"])), PAGE.parent / "tasks-cpu.png")


if __name__ == "__main__":
    main()
