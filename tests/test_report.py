"""The report: a page in a real browser, offline, with the numbers of the run folders."""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest

import lab.report.__main__ as report
from core.config import load_config, to_toml
from core.errors import UserError
from lab.report.data import POINTS, find_runs, read_run, split_config, thinned
from lab.report.parts import log_ticks, styles

HOSTILE = "<script>hacked=1<b>&'"
ATTACK = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)


def make_run(
    folder: Path, encoding: str, perplexities: dict[int, float | None], config: str = "lab", **options: object
) -> Path:
    """A run folder as train.py and eval_ppl.py leave it, without a checkpoint."""
    cfg = load_config([f"config/{config}.toml", f"--encoding={encoding}", *(f"--{k}={v}" for k, v in options.items())])
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(cfg))
    start = {"from_step": 0, "started": "2026-01-02T03:04:05+00:00", "command": "train.py", "git": "0123456789abcdef-dirty",
             "world_size": 2, "device": "NVIDIA H100", "torch": "2.13.0", "n_params": {"total": 478272}}  # fmt: skip
    (folder / "env.json").write_text(json.dumps([start]))
    log: list[dict] = [{"step": 0, "tokens": 0, "val_loss": 5.0}]
    log += [{"step": n, "tokens": 4096 * n, "loss": 2 + 3 / (n + 1), "tokens_per_second": 1000 + n} for n in range(cfg.steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    results = [
        {"run": cfg.name, "length": n, "perplexity": p, "stderr": p and 0.123, "tokens": p and 65536, "step": cfg.steps,
         "max_tokens": 0, "encoding": encoding}
        for n, p in perplexities.items()
    ]  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(results))
    return folder


def arguments(*runs: Path, **options: object) -> Namespace:
    """What the command line would give."""
    words = {"runs": list(map(str, runs)), "title": "", "samples": 0, "prompt": None, "device": "cpu"}
    return Namespace(**(words | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four runs: two whole ones, one of the paper's size, one bare with a hostile name and hostile contents."""
    out = tmp_path_factory.mktemp("runs")
    make_run(out / "rope", "rope", {64: 7.0346, 128: 7.6848, 512: 16.121}, steps=300)
    make_run(out / "learned", "learned", {64: 10.39, 128: None, 512: float("inf")}, steps=300, seed=3)
    make_run(out / "paper", "carope", {512: 21.5, 1024: 22.0}, "small", log_every=1, steps=800)
    hostile = make_run(out / HOSTILE, "rope", {}, steps=20, data=ATTACK)
    (hostile / "log.jsonl").unlink()
    scaled = {"length": 64, "perplexity": 9.0, "stderr": None, "rope_scaling": ATTACK, "scale": 2.0}
    (hostile / "eval.json").write_text(json.dumps([scaled]))
    tasks = {"run": "rope", "step": 300, "limit": None, "tasks": {"piqa": {"acc": 0.51234, "acc_stderr": 0.0123}}}
    others = {"run": "another", "tasks": {"piqa": {"acc": 0.9}}}
    (out / "rope/tasks.json").write_text(json.dumps([tasks, others]))
    few = {"run": "learned", "step": 300, "limit": 8, "tasks": {"copa": {"acc": 0.75}}}
    (out / "learned/tasks.json").write_text(json.dumps([few]))
    (out / "rope/analysis").mkdir()
    (out / f"rope/analysis/f{HOSTILE}.png").write_bytes(PNG)
    return out


@pytest.fixture(scope="module")
def html(folder: Path, tmp_path_factory) -> Path:
    """The page of all of them."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.render(arguments(*sorted(folder.iterdir()))))
    return path


def installed() -> str | None:
    """A browser of this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def attempt(command: list[str], **env: str) -> None:
    """Run a command that may fail, for three minutes at most."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=180, env=os.environ | env)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: this machine's, Debian's, or playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    if not installed() and shutil.which("apt-get") and os.geteuid() == 0:
        apt = "apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium"
        attempt(["sh", "-c", apt], DEBIAN_FRONTEND="noninteractive")
    with sync_api.sync_playwright() as playwright:
        if not installed() and not Path(playwright.chromium.executable_path).exists():
            attempt([sys.executable, "-m", "playwright", "install", "chromium"])
        try:
            browser = playwright.chromium.launch(executable_path=installed(), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium can be had here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, html):
    """The page at the width of a desktop; afterwards it must have said nothing and asked for nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith(("http", "ws")) else None)
    page.goto(html.as_uri())
    page.wait_for_selector("#plot-speed .main-svg")
    yield page
    context.close()
    assert said == []


def until(page, condition: str, seconds: float = 30) -> None:
    """Wait for a condition in JavaScript; the page's policy forbids the eval by which playwright's own would."""
    limit = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < limit, f"never came true: {condition}"
        page.wait_for_timeout(20)


def rows(page, title: str) -> dict[str, list[str]]:
    """The visible rows of a section's first table: first cell → the others."""
    found = (
        page.locator("section", has=page.locator(f"h2:text-is('{title}')")).locator("table").first.locator("tbody tr:visible")
    )
    cells = [row.locator("td").all_inner_texts() for row in found.all()]
    return {name.strip(): [text.strip() for text in rest] for name, *rest in cells}


def test_the_tables_and_plots_hold_the_numbers_of_the_runs(page, folder):
    table = rows(page, "Perplexity by length")
    assert table["rope"][3:] == ["7.03 ± 0.12", "7.68 ± 0.12", "16.12 ± 0.12", ""]
    assert table["learned"][3:] == ["10.39 ± 0.12", "–", "∞", ""]
    names = sorted(path.name for path in folder.iterdir())
    drawn = page.evaluate("document.getElementById('plot-length').data.map(t => [t.meta, [...t.x], [...t.y]])")
    assert [names.index("rope"), [64, 128, 512], [7.0346, 7.6848, 16.121]] in drawn
    assert rows(page, "Throughput")["rope"][0] == "1,150"
    assert rows(page, "Provenance")["rope"][:4] == ["0", "2026-01-02 03:04", "0123456789-dirty", "2 × NVIDIA H100"]
    losses = page.evaluate("document.getElementById('plot-loss').data.map(t => [t.meta, t.mode, t.x.length])")
    assert [names.index("rope"), "lines", 300] in losses and [names.index("rope"), "markers", 1] in losses


def test_the_papers_numbers_stand_beside_the_runs_of_its_models_only(page):
    table = page.locator("section", has=page.locator("h2:text-is('Table 1')")).locator("table").first.locator("tbody tr")
    found = [[text.strip() for text in row.locator("td").all_inner_texts()][:7] for row in table.all()]
    assert [row[3:] for row in found] == [
        ["512", "21.50 ± 0.12", "21.23", "+1.3 %"],
        ["1024", "22.00 ± 0.12", "21.39", "+2.9 %"],
    ]
    assert {row[0] for row in found} == {"paper"}


def test_what_the_harness_found_is_there_for_the_runs_that_it_was_asked_of(page):
    assert rows(page, "Tasks") == {
        "rope": ["300", "all", "–", "0.5123 ± 0.012"],
        "learned": ["300", "first 8 of each", "0.75", "–"],
    }


def test_a_chip_takes_a_run_out_of_every_plot_and_table_and_back(page, folder):
    number = sorted(path.name for path in folder.iterdir()).index("rope")
    curves = "[...document.querySelectorAll('.plot')].flatMap(p => p.data).filter(t => t.meta === %d).map(t => t.visible)"
    lowest = "[...document.querySelectorAll('td.lowest')].map(c => c.parentElement.cells[0].innerText.trim())"
    chip = page.locator(f"button[data-run='{number}']")
    assert set(page.evaluate(curves % number)) == {True} and "rope" in page.evaluate(lowest)
    before = page.locator("#plot-loss .scatterlayer .trace").count()
    chip.click()
    assert set(page.evaluate(curves % number)) == {False} and chip.get_attribute("aria-pressed") == "false"
    assert page.locator("#plot-loss .scatterlayer .trace").count() == before - 2
    assert page.locator(f"main [data-run='{number}']:visible").count() == 0 and "rope" not in page.evaluate(lowest)
    page.click("text=none")
    assert page.locator("main [data-run]:visible").count() == 0
    page.click("button.all >> text=all")
    assert set(page.evaluate(curves % number)) == {True} and "rope" in rows(page, "Runs")


def test_the_slider_smooths_the_training_loss_only(page):
    spread = "document.getElementById('plot-loss').data.filter(t => t.mode === '%s').map(t => Math.max(...t.y))"
    before, points = page.evaluate(spread % "lines"), page.evaluate(spread % "markers")
    page.locator("#smooth").fill("101")
    assert page.locator("#smooth-value").inner_text() == "101"
    assert all(a < b for a, b in zip(page.evaluate(spread % "lines"), before, strict=True))
    assert page.evaluate(spread % "markers") == points


def test_a_phone_shows_it_without_sideways_scrolling(page):
    page.set_viewport_size({"width": 390, "height": 844})
    until(page, "document.querySelector('#plot-loss .main-svg').getBoundingClientRect().width <= 390")
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_names_and_contents_are_text_and_never_markup(page):
    assert page.evaluate("typeof hacked") == "undefined" and page.locator("main img").count() == 1
    assert page.locator("button[data-run] span").all_inner_texts().count(HOSTILE) == 1
    assert HOSTILE in rows(page, "Runs") and ATTACK in rows(page, "Configuration")[HOSTILE]
    missing = rows(page, "Runs")[HOSTILE][-1]
    assert "no log" in missing
    assert page.locator("figcaption").inner_text() == f"rope: f{HOSTILE}.png"
    assert page.evaluate("document.querySelector('main img').naturalWidth") == 1


def test_colors_follow_the_scheme_and_paper_is_white(page):
    grid = "getComputedStyle(document.querySelector('#plot-loss .gridlayer path')).stroke"
    color = "document.getElementById('plot-loss').data[0].line.color"
    light = page.evaluate(grid), page.evaluate(color)
    page.emulate_media(color_scheme="dark")
    until(page, f"{color} !== '{light[1]}'")
    assert page.evaluate(grid) != light[0]
    page.emulate_media(color_scheme="dark", media="print")
    until(page, f"{color} === '{light[1]}'")
    assert page.evaluate("document.getElementById('plot-loss').layout.width") <= 690
    page.emulate_media(color_scheme="light", media="screen")
    until(page, "document.querySelector('#plot-loss .main-svg').getBoundingClientRect().width > 900")
    assert page.pdf().startswith(b"%PDF")


def test_samples_come_from_checkpoints_and_runs_without_one_say_so(runs, folder):
    text = report.render(arguments(runs / "carope", runs / "learned", folder / "rope", samples=1, prompt=["<b>Return "]))
    assert text.count("<article data-run=") == 2 and '<span class="prompt">&lt;b&gt;Return </span>' in text
    assert "no positions beyond 32 tokens" in text and "no sample: no checkpoint" in text
    assert "not evaluated" in text


def test_thinned_curves_keep_their_mean():
    log = [{"step": n, "tokens": n * 10, "loss": float(n % 7)} for n in range(9999)]
    x, y = thinned(log, "loss")
    assert len(x) == len(y) <= POINTS
    assert sum(y) / len(y) == pytest.approx(sum(r["loss"] for r in log) / len(log), rel=1e-2)
    assert thinned(log[:5], "loss") == ([0, 10, 20, 30, 40], [0, 1, 2, 3, 4])
    assert thinned([{"step": 1, "tokens": 1, "loss": float("nan")}], "loss") == ([], [])


def test_damaged_files_are_notes(tmp_path):
    (tmp_path / "config.toml").write_text("name = ")
    (tmp_path / "env.json").write_text("[1, {")
    (tmp_path / "eval.json").write_text('{"length": 3}')
    (tmp_path / "log.jsonl").write_text("[]\n{\n")
    record = read_run(tmp_path)
    assert len(record.notes) == 4 and (record.config, record.starts, record.variants, record.curves) == ({}, [], [], {})
    assert "no readable env.json" in report.render(arguments(tmp_path))


def test_only_keys_that_differ_differ(folder):
    differing, common = split_config([read_run(folder / name) for name in ("rope", "learned")])
    assert differing == ["seed", "encoding"] and common["n_layer"] == 4


def test_neighbors_differ_in_color_and_dash_and_no_style_comes_twice(folder):
    records = [read_run(folder / "rope") for _ in range(24)]
    for n, record in enumerate(records):
        record.config = record.config | {"encoding": f"e{n // 2}"}
    found = styles(records)
    assert len({tuple(style.items()) for style in found}) == 24
    assert all(a["dash"] != b["dash"] for a, b in zip(found[::2], found[2::2], strict=False))


def test_ticks_are_few_round_and_around_the_values():
    assert log_ticks([7, 25])[0] <= 7 and log_ticks([7, 25])[-1] >= 25 and 10 in log_ticks([7, 25])
    assert log_ticks([3, 900]) == [2, 5, 10, 20, 50, 100, 200, 500, 1000]


@pytest.mark.parametrize("what", ["missing", "no run", "files"])
def test_what_is_no_run_is_refused(tmp_path, what):
    (tmp_path / "lab.json").write_text("[]")
    path = {"missing": tmp_path / "none", "no run": tmp_path, "files": tmp_path / "lab.json"}[what]
    with pytest.raises(UserError, match=r"runs/NAME"):
        find_runs([str(path)])


def test_files_beside_the_runs_are_passed_over_and_a_run_comes_once(folder, tmp_path):
    (tmp_path / "lab.json").write_text("[]")
    assert find_runs([str(tmp_path / "lab.json"), str(folder / "rope"), f"{folder}/rope/"]) == [folder / "rope"]


@pytest.mark.parametrize("words", [["x", "--samples=-1"], ["x", "-o", "/"], ["x", "-o", "/none/r.html"]])
def test_mistakes_are_one_line(words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lab.report", *words])
    with pytest.raises(SystemExit) as left:
        report.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_the_command_writes_the_page_whole(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lab.report", str(folder / "rope"), "-o", str(tmp_path / "r.html"), "--samples=0"])
    with pytest.raises(SystemExit) as left:
        report.main()
    assert not left.value.code and "MiB" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text().endswith("</html>\n") and (tmp_path / "r.html").stat().st_size < 6 * 2**20
