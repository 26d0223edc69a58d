"""lab.analyze intervene: f replaced, and what that costs."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_command

from core.config import load_config
from core.errors import UserError
from lab.analyze import intervene
from lab.analyze.frequencies import collect, layers, replaced
from model import GPT


def disturbed(encoding: str) -> GPT:
    """A small model of three layers whose f differs by token."""
    words = [f"--encoding={encoding}", "--n_layer=3", "--n_head=2", "--n_embd=32", "--vocab_size=320", "--block_size=32"]
    model = GPT(load_config([*words, "--tokens_per_step=1024"]))
    with torch.no_grad():
        for one in model.encodings:
            one.W.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("encoding", ["carope", "carope_per_layer", "carope_hidden", "carope_hidden_shared"])
def test_a_replacement_reaches_every_site_and_is_undone(encoding):
    model, idx = disturbed(encoding), torch.arange(80).view(2, 40)
    with torch.no_grad():
        plain = model(idx)
        f_LBHT = collect(model, idx)
        assert f_LBHT.shape == (len(layers(model)), 2, 2, 40)
        with replaced(model, lambda site, f: f_LBHT[site]):  # the sites are numbered alike in every pass
            assert torch.equal(model(idx), plain)
        for i in range(len(f_LBHT)):
            with replaced(model, lambda site, f, i=i: intervene.other(site, f) if site == i else f):
                assert (model(idx) - plain).abs().max() > 1e-6
        assert torch.equal(model(idx), plain)


def test_the_mean_is_a_carope_of_that_constant():
    model, by_hand, idx = disturbed("carope"), disturbed("carope"), torch.arange(82).view(2, 41)
    (mean_H,) = intervene.means(model, [idx])
    with torch.no_grad():
        torch.testing.assert_close(mean_H, model.wpe.frequency(model.wte(idx[:, :-1])).mean((0, 2)).double())
        by_hand.wpe.W.weight.zero_()
        by_hand.wpe.W.bias.copy_((1 / mean_H - 1).expm1().log())
        with replaced(model, intervene.constant([mean_H])):
            torch.testing.assert_close(model(idx), by_hand(idx), atol=1e-4, rtol=0)


def test_means_are_per_layer_also_where_the_weights_are_shared():
    model, idx = disturbed("carope_hidden_shared"), torch.arange(82).view(2, 41)
    expected_LH = collect(model, idx[:, :-1]).mean((1, 3))
    torch.testing.assert_close(torch.stack(intervene.means(model, [idx])).float(), expected_LH)


def test_a_shuffle_keeps_each_windows_values_per_head():
    f_BHT = torch.rand(3, 2, 50)
    changed = intervene.shuffle(1)(0, f_BHT)
    assert torch.equal(changed.sort(-1).values, f_BHT.sort(-1).values) and not torch.equal(changed, f_BHT)
    assert torch.equal(changed, intervene.shuffle(1)(0, f_BHT))


def test_the_command_and_its_files(runs, tmp_path):
    words = ["--lengths", 32, 64, "--out", tmp_path, "--max_tokens", 1000, "--device", "cpu"]
    done = run_command("lab.analyze", "intervene", runs / "carope", runs / "carope", *words)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "intervene.json").read_text())["runs"]
    assert first == second
    assert [(r["length"], r["f"]) for r in first["results"]] == [(n, f) for n in (32, 64) for f in intervene.LABELS]
    assert all((r["difference"] == 0) == (r["f"] == "none") and r["nll_stderr"] > 0 for r in first["results"])
    assert (tmp_path / "intervene.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"runs": ["learned"]}, "'learned' has no f that depends on tokens"),
        ({"lengths": [0]}, "--lengths = 0: must be at least 1"),
        ({"lengths": [4096], "max_tokens": 5000}, "2500 is the longest"),
    ],
)
def test_refusals(runs, tmp_path, words, message):
    given = {"runs": ["carope"], "lengths": None, "max_tokens": 500, "seed": 1, "device": "cpu", "data": None} | words
    given["runs"] = [str(runs / name) for name in given["runs"]]
    with pytest.raises(UserError, match=message):
        intervene.run(SimpleNamespace(**given), tmp_path)
