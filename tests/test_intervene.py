"""analyze.py intervene: f replaced, and what that costs."""

import json

import pytest
import torch
from conftest import run_command

from analysis import intervene
from training.checkpoint import load_model


def test_a_replacement_reaches_the_model_and_is_undone(runs):
    model, _, _ = load_model(runs / "carope")
    idx = torch.arange(80).view(2, 40)
    with torch.no_grad():
        model.wpe.W.weight.add_(torch.randn(model.wpe.W.weight.shape, generator=torch.Generator().manual_seed(1)))
        plain = model(idx)
        with intervene.replaced(model, lambda _, f: f):
            assert torch.equal(model(idx), plain)
        with intervene.replaced(model, intervene.other):
            assert (model(idx) - plain).abs().max() > 1e-3
        (mean_H,) = intervene.means(model, [torch.arange(82).view(2, 41)])
        torch.testing.assert_close(mean_H, model.wpe.frequency(model.wte(idx + torch.tensor([[0], [1]]))).mean((0, 2)))
        by_hand = load_model(runs / "carope")[0]  # a CARoPE whose f is that constant by its weights
        by_hand.wpe.W.weight.zero_()
        by_hand.wpe.W.bias.copy_((1 / mean_H - 1).expm1().log())
        with intervene.replaced(model, intervene.constant([mean_H])):
            torch.testing.assert_close(model(idx), by_hand(idx), atol=1e-4, rtol=0)
        assert torch.equal(model(idx), plain)


def test_a_shuffle_keeps_each_windows_values():
    f_BHT = torch.rand(3, 2, 50)
    changed = intervene.shuffle(1)(0, f_BHT)
    assert torch.equal(changed.sort(-1).values, f_BHT.sort(-1).values) and not torch.equal(changed, f_BHT)
    assert not torch.equal(changed[0, 0].argsort(), changed[1, 0].argsort())


def test_the_command_and_its_files(runs, tmp_path):
    done = run_command("analyze.py", "intervene", runs / "carope", "--out", tmp_path, "--max_tokens", 2000, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "intervene.json").read_text())["results"]
    assert [(r["length"], r["f"]) for r in results] == [(n, f) for n in (32, 64, 128) for f in intervene.LABELS]
    assert all(r["growth"] == 0 for r in results if r["f"] == "none")
    assert (tmp_path / "intervene.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["{runs}/learned"], "'learned' has no f that depends on tokens"), (["{runs}/carope", "--lengths", "0"], "at least 1")],
)
def test_refusals(runs, words, message):
    done = run_command("analyze.py", "intervene", *(word.format(runs=runs) for word in words))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
