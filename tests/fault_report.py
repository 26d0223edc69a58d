"""What the tests in tests/faults report: fault → what happened → verdict, as a table and as JSON (--faults FILE).

A test takes the fixture `fault`, calls it with the fault it injects, and adds what it saw, in words and figures:

    def test_disk_full(fault, …):
        happened = fault("the disk is full in the middle of a checkpoint")
        …
        happened("exit code 2, the checkpoint before is whole", bytes_needed=…)
"""

import json
import os
import platform
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROWS = pytest.StashKey[list[dict[str, Any]]]()
MINE = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", metavar="FILE", help="write what the tests in tests/faults saw to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str], Callable[..., None]]:
    """fault(what) announces an injected fault; what it returns takes what happened, and figures by name."""
    rows = request.node.stash.setdefault(MINE, [])

    def announce(what: str) -> Callable[..., None]:
        row: dict[str, Any] = {"promise": promise(request.node.path), "fault": what, "happened": "", "figures": {}}
        rows.append(row)

        def happened(text: str, **figures: Any) -> None:
            row["happened"] = re.sub(r"\S*/pytest-of-[^/]+/pytest-\d+", "…", text)  # where this run had its files
            row["figures"] |= figures

        return happened

    return announce


def promise(path: Path) -> str:
    """ "checkpoints" of tests/faults/test_01_checkpoints.py."""
    return path.stem.removeprefix("test_").replace("_", " ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.when == "call":
        for row in item.stash.get(MINE, []):
            verdict = {"passed": "held", "failed": "BROKEN", "skipped": "not tried"}[report.outcome]
            row |= {"verdict": verdict, "seconds": round(report.duration, 1), "test": item.nodeid}
            item.config.stash[ROWS].append(row)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, path = config.stash[ROWS], config.getoption("--faults")
    if not path or not rows:
        return
    for row in rows:
        head = f"{row['promise']:22.22} {row['verdict']:10}"
        text = f"{row['fault']} → {row['happened']}"
        for i, line in enumerate(textwrap.wrap(text, 92)):
            terminalreporter.write_line(f"{head if i == 0 else '':33} {line}")
    held = sum(row["verdict"] == "held" for row in rows)
    terminalreporter.write_line(f"{held} of {len(rows)} faults held")
    sys.path.insert(0, str(config.rootpath))
    from core.distributed import pick_device
    from core.provenance import device_name, git_version

    about = {
        "command": shlex.join(["pytest", *config.invocation_params.args]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_version(),
        "machine": f"{os.cpu_count()} × {device_name(pick_device('cpu'))}, {platform.platform()}",
        "n": 1,
        "held": held,
        "faults": rows,
    }
    Path(path).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def render_figures(faults: dict[str, Any], soak: dict[str, Any]) -> str:
    """The table of docs/reliability.md from results/faults.json and results/soak.json."""
    figures: dict[str, Any] = {}
    for row in faults["faults"]:
        figures |= row["figures"]
    kills = {row["test"].split("::")[1]: row["figures"] for row in soak["faults"]}
    training = kills["test_training_on_two_ranks"]
    leaving = [row["figures"]["leaving_s"] for row in faults["faults"] if "leaving_s" in row["figures"]]
    size = f"GPT-Tiny, {figures['bytes'] / 1e6:,.0f} MB with AdamW's averages"
    rows = [
        ("faults injected, and promises that held", f"{len(faults['faults'])}, {faults['held']}"),
        *((f"SIGKILLs survived, {name[5:].replace('_', ' ')}", str(found["kills"])) for name, found in kills.items()),
        ("from the start of a killed run to its next step, two ranks", seconds(training["start_to_first_step_s"])),
        (f"step stall of a checkpoint, {size}", seconds(figures["sync_stall_s"])),
        ("the same with --async_checkpoint=true", seconds(figures["async_stall_s"])),
        ("the same until it is safe on disk", seconds(figures["async_until_safe_s"])),
        ("loading and verifying it", seconds(figures["load_and_verify_s"])),
        ("from a signal until the processes are gone, small models", f"{max(leaving):.1f} s at most, n = {len(leaving)}"),
    ]
    table = "".join(f"| {what} | {figure} |\n" for what, figure in rows)
    machines = " / ".join(dict.fromkeys(report["machine"] for report in (faults, soak)))
    return (
        f"| what | measured |\n|---|---|\n{table}\nMedian (least to most). Commit {faults['git'][:7]} (`make faults`) and "
        f"{soak['git'][:7]} (`make soak`, seed {training['seed']}), {faults['date'][:10]}, on {machines}.\n"
    )


def seconds(spread: dict[str, float]) -> str:
    """A spread as text: 1.2 s (1.1 to 1.3)."""
    return f"{spread['median']:.2f} s ({spread['min']:.2f} to {spread['max']:.2f})"


def update_docs() -> None:
    """Put the figures of the last committed reports into docs/reliability.md."""
    root = Path(__file__).parents[1]
    page = root / "docs/reliability.md"
    reports = [json.loads((root / f"results/{name}.json").read_text()) for name in ("faults", "soak")]
    before, rest = page.read_text().split("<!-- figures -->\n")
    page.write_text(f"{before}<!-- figures -->\n{render_figures(*reports)}<!-- end -->{rest.split('<!-- end -->')[1]}")


if __name__ == "__main__":
    update_docs()
