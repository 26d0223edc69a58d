"""docs/: every figure has a file behind it, every promise a test."""

import json
import re

import pytest
from conftest import ROOT
from fault_report import render_figures

from lab.pages.__main__ import PAGES as COMPUTED

PAGE = (ROOT / "docs/reliability.md").read_text()


def test_the_figures_of_reliability_are_those_of_the_reports():
    reports = [json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("faults", "soak")]
    assert f"<!-- figures -->\n{render_figures(*reports)}<!-- end -->" in PAGE
    for report in reports:
        assert {"command", "date", "git", "machine", "n", "held", "faults"} <= set(report)
        assert [row["fault"] for row in report["faults"] if row["verdict"] != "held"] == []


@pytest.mark.parametrize("number", range(1, 13))
def test_every_promise_has_its_test(number):
    (path,) = (ROOT / "tests/faults").glob(f"test_{number:02}_*.py")
    assert f"`tests/faults/{path.name}`" in PAGE


@pytest.mark.parametrize("page", COMPUTED)
def test_what_is_computed_in_a_page_is_what_results_model_and_classes_say(page):
    text = (ROOT / page).read_text()
    for name, block in COMPUTED[page]().items():
        assert f"<!-- {name} -->\n{block}<!-- end -->" in text, f"python -m lab.pages {page} writes it"


def test_measured_figures_say_where_they_come_from():
    from lab.pages.performance import TARGETS, result

    report = json.loads((ROOT / "results/overlap-cpu.json").read_text())
    assert {"world_size", "backend"} <= set(report)
    for found in (report, *(result(name) for name in {name for _, _, name, _ in TARGETS})):
        assert {"command", "git", "device", "torch"} <= set(found) and "dirty" not in found["git"]


def test_every_option_the_page_names_exists():
    from core.config import Config

    for key in re.findall(r"--(\w+_\w+)", PAGE):
        assert key in Config.model_fields or key == "nproc_per_node", key


def test_every_encoding_has_its_row():
    from positional import ENCODINGS

    page = (ROOT / "docs/encodings.md").read_text()
    assert all(f"| `{name}` | " in page for name in ENCODINGS)


def test_the_summary_of_the_laboratory_is_that_of_its_runs():
    from core.sweep.report import summarize

    found = json.loads((ROOT / "results/lab-cpu.json").read_text())
    assert found["summary"] == summarize(found["runs"], found["baseline"])
    assert not any("dirty" in run["git"] for run in found["runs"])
