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
            row["happened"] = text
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
    from distributed import pick_device
    from provenance import device_name, git_version

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
