"""The README: its encoding is one class, its numbers have a file behind them. Its commands run in test_pages.py."""

import json
import math
import re

import pytest
from conftest import ROOT, run_command

from core.files import sha256_file

README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=32", "--vocab_size=320", "--steps=2", "--warmup_steps=0",
    "--eval_tokens=500", "--final_eval_tokens=500", "--micro_batch=4", "--tokens_per_step=256", "--device=cpu",
]  # fmt: skip


def test_the_readmes_encoding_is_one_file_that_every_script_takes(corpus, tmp_path):
    """It is trained, evaluated beyond the training length, decoded and compared, and no other file knows it."""
    block = next(block for block in CODE if block.startswith("# half_rope.py\n"))
    (tmp_path / "half_rope.py").write_text(block)
    plugin = ["--plugin", tmp_path / "half_rope.py"]
    words = [*SCALE, f"--data={corpus}", f"--out_dir={tmp_path}"]
    trained = run_command("train.py", "config/demo.toml", *plugin, "--encoding=half_rope", *words)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "demo-half_rope"
    again = ["--lengths", 32, 128, "--max_tokens", 1000, "--json", tmp_path / "found.json"]
    for script, more in (("eval_ppl.py", again), ("sample.py", ["--max_new_tokens", "40", "--temperature", "0"])):
        without = run_command(script, run, *more)
        assert without.returncode == 2 and f"--plugin {tmp_path}/half_rope.py loads it" in without.stderr, without.stderr
        done = run_command(script, run, *more, *plugin)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    assert [(r["encoding"], r["tokens"]) for r in results] == [("half_rope", 1000)] * 2
    state = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())
    assert state["plugin"] == {"path": str(tmp_path / "half_rope.py"), "sha256": sha256_file(tmp_path / "half_rope.py")}

    sweep = ["--encodings", "rope", "half_rope", "--seeds", 1, 2, "--lengths", 32, "--max_tokens", 500]
    compared = run_command("lab.sweep", "config/demo.toml", *plugin, *sweep, *words)
    assert compared.returncode == 0 and "| half_rope | " in compared.stdout, compared.stderr
    assert sorted(path.name for path in tmp_path.glob("demo-*/")) == [
        "demo-half_rope", "demo-half_rope-s2", "demo-rope", "demo-rope-s2",
    ]  # fmt: skip


def test_the_python_of_the_readme_runs():
    names: dict = {}
    for block in CODE:
        if not block.startswith("# half_rope.py"):
            exec(block, names)
    assert names["model"].cfg.n_layer == 4


def test_the_papers_numbers_are_those_of_table1():
    from table1 import PAPER

    for (size, length), row in PAPER.items():
        name = f"GPT-{size.capitalize()}, paper" if length == 512 else ""
        cells = [f"{row[e]:.2f}" if e in row else "–" for e in ("rope", "carope", "learned", "sinusoidal")]
        assert f"| {name} | {length} | {' | '.join(cells)} |".replace("|  |", "| |") in README


def test_the_estimated_hours_are_those_of_the_dry_run():
    from core.sweep.scaling import Machine
    from lab.pages.scaling import ENCODINGS, config, hours_from

    sizes = {size: [config(size, encoding) for encoding in ENCODINGS] for size in ("tiny", "small")}
    tiny, small = (hours_from(cfgs[0], 0, 2) for cfgs in sizes.values())
    total = {gpus: sum(hours_from(cfg, 0, gpus) for cfgs in sizes.values() for cfg in cfgs) for gpus in (1, 2, 8)}
    dollars = {gpus: f"${hours * gpus * Machine.dollars:.0f}" for gpus, hours in total.items()}
    assert f"GPT-Tiny {tiny:.1f} hours a run, GPT-Small {small:.1f}, all eight {total[2]:.1f}, on two H200s" in PROSE
    assert f"(about {total[2]:.0f} hours on two H200s)" in PROSE
    assert (
        f"{total[1]:.1f} on one, {total[8]:.1f} on eight ({dollars[1]} to {dollars[8]} at ${Machine.dollars:.2f} per" in PROSE
    )


def test_the_findings_are_those_of_the_results():
    from positional import ENCODINGS
    from table1 import PAPER

    def at(file: str, encoding: str, length: int) -> dict:
        summary = json.loads((ROOT / file).read_text())["summary"]
        return next(r for r in summary if (r["encoding"], r["length"]) == (encoding, length))

    lab, gpu = "results/lab-cpu.json", "results/lab-gpu.json"
    behind = {e: at(lab, e, 64) for e in ("carope", "carope_hidden")}
    nats = {e: f"{r['nll_difference']:+.3f} ± {r['nll_difference_stderr']:.3f}".replace("-", "−") for e, r in behind.items()}
    assert f"differs by {nats['carope_hidden']} nats" in PROSE and f"by {nats['carope']}." in PROSE
    far = {e: at(lab, e, 256) for e in ("rope", "carope", "carope_hidden")}
    rope, carope, hidden = (f"{r['perplexity']:.1f} ± {r['perplexity_stderr']:.1f}" for r in far.values())
    assert f"(perplexity {hidden} against {rope}), and `carope` ({carope})" in PROSE
    assert abs(far["carope"]["nll_difference"]) < far["carope"]["nll_difference_stderr"]

    ahead = {key: math.log(row["rope"] / row["carope"]) for key, row in PAPER.items()}
    assert f"by {ahead['small', 1024]:.2f} nats (GPT-Small) and {ahead['tiny', 1024]:.2f} (GPT-Tiny)" in PROSE
    assert f"the paper's gain, {ahead['small', 512]:.3f} and {ahead['tiny', 512]:.3f} nats" in PROSE
    loses = {e: at(gpu, e, 1024)["nll"] - at(gpu, e, 512)["nll"] for e in ("rope", "carope")}
    assert f"RoPE loses {loses['rope']:.3f} nats from 512 to 1024 and `carope` {loses['carope']:.3f}," in PROSE
    assert f"`carope` is ahead by {-at(gpu, 'carope', 8192)['nll_difference']:.3f}." in PROSE
    assert f"{len(ENCODINGS)} encodings to compare" in PROSE


def test_every_measured_table_comes_from_its_file():
    blocks = re.findall(r"<!-- (results/\S+\.json) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert blocks
    from table1 import render

    for file, text in blocks:
        report = json.loads((ROOT / file).read_text())
        assert {"command", "commit", "machine", "n", "seed", "results"} <= set(report)
        assert render(report["results"]).strip() == text.strip()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_every_link_of_the_readme_leads_to_a_file(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", re.findall(r"`([\w/]+\.(?:py|toml|md|json))`", README))
def test_every_file_the_readme_names_exists(path):
    assert (ROOT / path).exists() or path in ("config.toml", "env.json", "state.json", "table1.md", "half_rope.py")
