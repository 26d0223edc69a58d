"""The README: its commands run, its code runs, its numbers have a file behind them."""

import json
import re
import shlex
import subprocess

import pytest
from conftest import ROOT, run_command, torchrun

README = (ROOT / "README.md").read_text()
CODE = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("sh", "python")}
COMMANDS = [shlex.split(line, comments=True) for block in CODE["sh"] for line in block.splitlines() if line.strip()]
SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=32", "--vocab_size=320", "--steps=2", "--warmup_steps=0",
    "--eval_tokens=500", "--final_eval_tokens=500", "--micro_batch=4", "--tokens_per_step=256", "--device=cpu",
]  # fmt: skip


def test_every_command_of_the_readme_runs_at_demo_scale(corpus, tmp_path):
    """In the README's order, with the corpus in place of FineWeb-Edu and a toy in place of each model."""
    here = [f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]
    seen = set()
    for program, *words in COMMANDS:
        if program == "make":
            assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode == 0
            continue
        if program == "torchrun":
            nproc = int(words[1].removeprefix("--nproc_per_node="))
            done = torchrun(nproc, *words[2:], *here)
        elif words[0] == "prepare_fineweb.py":
            small = ["--source", "demo", "--limit_tokens", "30_000", "--val_tokens", "10_000"]
            done = run_command(*words, *small, "--out", tmp_path / "data")
        elif words[0] == "table1.py":
            one = ["--sizes", "tiny", "--encodings", "rope", "--lengths", "32", "--max_tokens", "500"]
            small = [] if "--dry_run" in words else one
            done = run_command(*words, *small, *here)
        elif words[0] == "lab.py":  # tests/test_lab.py does more than plan
            done = run_command(*words, "--dry_run", *here)
        elif words[0] == "report.py":  # the shell's part, then the page; tests/test_report.py looks at it
            folders = sorted(path.parent for path in tmp_path.glob("*/config.toml"))
            words = [
                word for w in words for word in (folders if w == "runs/*" else [w.replace("report.html", f"{tmp_path}/r.html")])
            ]
            done = run_command(*words)
        elif words[0] == "train.py":
            done = run_command(*words, *here)
        else:
            if not (tmp_path / "small-rope").exists():  # the README trains one of the two it compares
                run_command("train.py", "config/small.toml", "config/rope.toml", *here)
            words = [word.replace("runs/", f"{tmp_path}/") for word in words]
            done = run_command(*words, *(["--max_tokens", 2000] if words[0] == "eval_ppl.py" else []))
        assert done.returncode == 0, f"{program} {words}: {done.stderr}"
        seen.add(words[0])
    assert {"prepare_fineweb.py", "train.py", "eval_ppl.py", "sample.py", "table1.py", "report.py"} <= seen


def test_the_python_of_the_readme_runs_and_a_new_encoding_is_one_class(corpus, tmp_path):
    """The README's class is trained, evaluated beyond the training length and decoded, and no other file knows it."""
    import torch

    from distributed import Distributed
    from eval_ppl import evaluate_run
    from positional import ENCODINGS
    from train import train

    names: dict = {}
    try:
        for block in CODE["python"]:
            exec(block, names)
        assert names["model"].cfg.n_layer == 4
        cfg = names["load_config"]([*SCALE, "--encoding=half_rope", f"--data={corpus}", f"--out_dir={tmp_path}", "--name=half"])
        train(cfg)
        with Distributed.start("cpu") as dist:
            results = evaluate_run(tmp_path / "half", [32, 128], dist, max_tokens=1000)
        assert [(r["encoding"], r["tokens"]) for r in results] == [("half_rope", 1000)] * 2
        model, idx = names["GPT"](cfg), torch.arange(8)[None]
        new = torch.stack(list(model.generate(idx, 40, n_vocab=257, temperature=0)), dim=1)
        every = torch.cat((idx, new), dim=1)
        assert torch.equal(model(every)[:, 7:-1, :257].argmax(-1), new)
    finally:
        ENCODINGS.pop("half_rope", None)


def test_the_papers_numbers_are_those_of_table1():
    from table1 import PAPER

    for (size, length), row in PAPER.items():
        name = f"GPT-{size.capitalize()}, paper" if length == 512 else ""
        cells = [f"{row[e]:.2f}" if e in row else "–" for e in ("rope", "carope", "learned", "sinusoidal")]
        assert f"| {name} | {length} | {' | '.join(cells)} |".replace("|  |", "| |") in README


def test_the_estimated_hours_are_those_of_the_dry_run():
    from benchmarks.scaling import Machine
    from benchmarks.scaling_report import ENCODINGS, config, hours_from

    sizes = {size: [config(size, encoding) for encoding in ENCODINGS] for size in ("tiny", "small")}
    tiny, small = (hours_from(cfgs[0], 0, 2) for cfgs in sizes.values())
    total = {gpus: sum(hours_from(cfg, 0, gpus) for cfgs in sizes.values() for cfg in cfgs) for gpus in (1, 2, 8)}
    dollars = {gpus: f"${hours * gpus * Machine.dollars:.0f}" for gpus, hours in total.items()}
    assert f"GPT-Tiny {tiny:.1f} hours a run, GPT-Small {small:.1f}, all eight {total[2]:.1f}, on two H100s" in README
    assert (
        f"{total[1]:.1f} on one, {total[8]:.1f} on eight ({dollars[1]} to {dollars[8]} at ${Machine.dollars:.2f} per" in README
    )


def test_every_measured_table_comes_from_its_file():
    blocks = re.findall(r"<!-- (results/\S+\.json) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert blocks
    from table1 import render

    for file, text in blocks:
        report = json.loads((ROOT / file).read_text())
        assert {"command", "commit", "machine", "n", "seed", "results"} <= set(report)
        assert render(report["results"]).strip() == text.strip()


@pytest.mark.parametrize("path", re.findall(r"`([\w/]+\.(?:py|toml|md|json))`", README))
def test_every_file_the_readme_names_exists(path):
    assert (ROOT / path).exists() or path in ("config.toml", "env.json", "state.json", "table1.md", "config/half_rope.toml")
