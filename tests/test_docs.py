"""docs/: every figure has a file behind it, every promise a test."""

import json
import re

import pytest
from conftest import ROOT
from fault_report import render_figures

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


def test_the_tables_of_scaling_are_the_models_and_the_measured_ones():
    from lab.bench.scaling_report import blocks

    page = (ROOT / "docs/scaling.md").read_text()
    for name, text in blocks().items():
        assert f"<!-- {name} -->\n{text}<!-- end -->" in page, "python -m lab.bench.scaling_report writes them"
    report = json.loads((ROOT / "results/overlap-cpu.json").read_text())
    assert {"command", "git", "device", "torch", "world_size", "backend"} <= set(report) and "dirty" not in report["git"]


def test_the_tables_of_performance_are_those_of_the_benchmarks():
    from lab.bench.performance_report import TARGETS, blocks, result

    page = (ROOT / "docs/performance.md").read_text()
    for name, text in blocks().items():
        assert f"<!-- {name} -->\n{text}<!-- end -->" in page, "python -m lab.bench.performance_report writes them"
    for name in {name for _, _, name, _ in TARGETS if name}:
        assert {"command", "git", "device", "torch"} <= set(result(name)) and "dirty" not in result(name)["git"]


def test_every_option_the_page_names_exists():
    from core.config import Config

    for key in re.findall(r"--(\w+_\w+)", PAGE):
        assert key in Config.model_fields or key == "nproc_per_node", key


def test_the_table_of_encodings_is_what_the_classes_say():
    from lab.encodings_report import render
    from positional import ENCODINGS

    page = (ROOT / "docs/encodings.md").read_text()
    assert f"<!-- encodings -->\n{render()}<!-- end -->" in page, "python -m lab.encodings_report writes it"
    assert all(f"| `{name}` | " in page for name in ENCODINGS)


def test_the_tables_of_the_findings_are_those_of_the_laboratory():
    from core.sweep.report import summarize
    from lab.sweep_report import blocks

    page = (ROOT / "docs/findings.md").read_text()
    for name, text in blocks().items():
        assert f"<!-- {name} -->\n{text}<!-- end -->" in page, "python -m lab.sweep_report writes them"
    found = json.loads((ROOT / "results/lab-cpu.json").read_text())
    assert found["summary"] == summarize(found["runs"], found["baseline"])
    assert not any("dirty" in run["git"] for run in found["runs"])
