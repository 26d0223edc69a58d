"""docs/scaling.md: its tables, from the model and from results/overlap-cpu.json."""

import json
from typing import Any

from core.config import Config, load_config
from core.files import ROOT
from core.sweep.scaling import MEASURED, Machine, describe, hours_from, machine_for, memory, predict, render
from core.tables import table
from lab.bench import overlap

GPUS = (1, 2, 4, 8, 16, 32, 64)
ENCODINGS = ("rope", "carope", "learned", "sinusoidal")


def config(size: str, encoding: str = "rope") -> Config:
    """A configuration of Table 1."""
    return load_config([str(ROOT / f"config/{name}.toml") for name in (size, encoding)])


def render_steps() -> str:
    """A table per size of Table 1, a row per number of GPUs."""
    parts = []
    for size in ("small", "tiny"):
        cfg = config(size)
        table = render([predict(cfg, gpus) for gpus in GPUS])
        parts.append(f"GPT-{size.capitalize()}, {describe([machine_for(cfg)])}:\n\n{table}")
    return "\n".join(parts)


def render_table1() -> str:
    """Hours and cost of the paper's eight runs on 1, 2 and 8 GPUs."""
    rows = []
    for gpus in (1, 2, 8):
        hours = {size: [hours_from(config(size, e), 0, gpus) or 0.0 for e in ENCODINGS] for size in ("tiny", "small")}
        total = sum(map(sum, hours.values()))
        cells = [f"{hours[size][0]:.2f} h" for size in hours] + [f"{total:.1f} h", f"{gpus * total:.1f}"]
        rows.append([gpus, *cells, f"${gpus * total * Machine.dollars:,.0f}"])
    return table(["GPUs", "a run of GPT-Tiny", "a run of GPT-Small", "all eight runs", "GPU-hours", "cost"], rows)


def render_memory() -> str:
    """A row per candidate that was measured on a GPU: the model's bytes beside the allocator's."""
    report = json.loads(MEASURED.read_text())
    rows = []
    for row in report["stages"]["speed"]["results"]:
        cfg = Config(**row["config"])
        predicted, found = memory(cfg, 1, cfg.micro_batch, 2), row["peak_memory_bytes"]
        name = f"{row['candidate']}: {cfg.n_layer} layers of {cfg.n_embd}, {cfg.micro_batch} × {cfg.block_size}"
        rows.append([name, f"{predicted / 1e9:.1f} GB", f"{found / 1e9:.1f} GB", f"{predicted / found:.2f}"])
    text = table(["on one GPU", "predicted", "measured", "predicted ÷ measured"], rows)
    return f"{text}\nMeasured by torch's allocator at commit {report['git'][:7]}, {report['device']}.\n"


def render_overlap(report: dict[str, Any]) -> str:
    """What `lab.bench overlap` measured."""
    table = overlap.render(report["no_exchange"], report["results"])
    own = min(report["results"][0]["ranks"], key=lambda rank: rank["exchange_ms"])
    parts = ", ".join(f"{part} {own[f'step_{part}_ms']:.0f} ms" for part in overlap.PARTS)
    sent = report["results"][0]["sent_bytes"] / 1e6
    machine = f"{report['cores']} cores ({report['device']}), torch {report['torch']}, commit {report['git'][:7]}"
    return (
        f"{table}\nEach rank sends {sent:.1f} MB a step. Parts of a step with torch's own buckets: {parts} (backward with the "
        f"wait for the exchange).\n`{report['command']}`, {report['world_size']} ranks by {report['backend']} on {machine}; "
        f"n = {report['no_exchange']['n']} timed steps of each, interleaved.\n"
    )


def blocks() -> dict[str, str]:
    """Text for each marker of the page."""
    report = json.loads((ROOT / "results/overlap-cpu.json").read_text())
    return {"steps": render_steps(), "table1": render_table1(), "memory": render_memory(), "overlap": render_overlap(report)}
