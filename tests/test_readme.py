"""The README: its encoding is one class, its numbers have a file behind them. Its commands run in test_pages.py."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=32", "--vocab_size=320", "--steps=2", "--warmup_steps=0",
    "--eval_tokens=500", "--final_eval_tokens=500", "--micro_batch=4", "--tokens_per_step=256", "--device=cpu",
]  # fmt: skip


def test_the_python_of_the_readme_runs_and_a_new_encoding_is_one_class(corpus, tmp_path):
    """The README's class is trained, evaluated beyond the training length and decoded, and no other file knows it."""
    import torch

    from core.distributed import Distributed
    from eval_ppl import evaluate_run
    from positional import ENCODINGS
    from train import train

    names: dict = {}
    try:
        for block in CODE:
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
    from core.sweep.scaling import Machine
    from lab.bench.scaling_report import ENCODINGS, config, hours_from

    sizes = {size: [config(size, encoding) for encoding in ENCODINGS] for size in ("tiny", "small")}
    tiny, small = (hours_from(cfgs[0], 0, 2) for cfgs in sizes.values())
    total = {gpus: sum(hours_from(cfg, 0, gpus) for cfgs in sizes.values() for cfg in cfgs) for gpus in (1, 2, 8)}
    dollars = {gpus: f"${hours * gpus * Machine.dollars:.0f}" for gpus, hours in total.items()}
    assert f"GPT-Tiny {tiny:.1f} hours a run, GPT-Small {small:.1f}, all eight {total[2]:.1f}, on two H200s" in README
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
