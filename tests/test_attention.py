"""lab.analyze attention: what it takes for the attention weights are the model's, under every encoding."""

import math
import sys

import pytest
import torch
from test_positional import build, tokens

from core.errors import UserError
from lab.analyze.__main__ import main
from lab.analyze.attention import Sums, distance_bins, watched, weight_columns
from positional import ENCODINGS
from positional.bias import alibi_slopes
from positional.weighted import causal_softmax, logits_of


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_the_weights_times_the_values_are_the_models_own_output(encoding):
    model, idx = build(encoding), tokens(24)  # 24 is no multiple of a head's 16 channels
    seen = []
    with torch.no_grad(), watched(model, lambda *args: seen.append(args)):
        logits = model(idx)
    assert [layer for layer, *_ in seen] == [0, 1]
    for _, attend, q, k, v, y in seen:
        with torch.no_grad():
            weights = torch.cat([w for _, w in weight_columns(attend, q, k)], dim=-1)
        torch.testing.assert_close(weights @ v, y, rtol=0, atol=1e-5 * max(1, y.abs().max().item()))
        assert weights.triu(1).abs().max() == 0
        if encoding != "urpe":
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(idx), logits) and len(seen) == 2  # no longer watched, and watching changes nothing


def test_they_are_the_softmax_that_the_formula_says():
    model, idx = build("alibi"), tokens(24)
    seen = []
    with torch.no_grad(), watched(model, lambda *args: seen.append(args)):
        model(idx)
        _, attend, q, k, *_ = seen[1]
        weights = torch.cat([w for _, w in weight_columns(attend, q, k)], dim=-1)
    distance = (torch.arange(24)[:, None] - torch.arange(24)).clamp(min=0)
    bias = -alibi_slopes(model.cfg.n_head).float()[:, None, None] * distance
    expected = causal_softmax(logits_of(q, k) + bias, torch.ones(24, 24, dtype=torch.bool).tril())
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 32, 33, 48, 512])
def test_bins_hold_every_distance_once(length):
    assert [d for a, b in distance_bins(length) for d in range(a, b + 1)] == list(range(length))


def test_uniform_attention_has_the_distances_that_one_computes_by_hand():
    T, D = 32, 8
    sums = Sums(1, 1, T, torch.device("cpu"))
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    sums.add(0, lambda q, k, v: uniform @ v, *torch.zeros(4, 3, 1, T, D))
    found = sums.summary()
    (head,) = found["layers"][0]
    queries = range(T // 2, T)
    mean = {
        "distance": [i / 2 for i in queries],
        "entropy": [math.log(i + 1) for i in queries],
        "first": [1 / (i + 1) for i in queries],
        "itself": [1 / (i + 1) for i in queries],
        "recent": [16 / (i + 1) for i in queries],
        "sum": [1.0],
    }
    assert found["queries"] == 3 * 16
    for key, values in mean.items():
        assert head[key] == pytest.approx(sum(values) / len(values), rel=1e-5), key
    assert sum(head["histogram"]) == pytest.approx(1) and sum(found["keys"]) == pytest.approx(24.5)


def test_the_command_writes_json_and_figure(runs, tmp_path, monkeypatch, capsys):
    words = ["attention", str(runs / "carope"), str(runs / "learned"), "--windows", "4", "--device=cpu", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["lab.analyze", *words])
    with pytest.raises(SystemExit) as leave:
        main()
    assert leave.value.code in (0, None), capsys.readouterr().err
    assert (tmp_path / "attention.png").stat().st_size > 10_000 and (tmp_path / "attention.json").is_file()


def test_a_wrong_number_of_windows_is_refused(tmp_path):
    from argparse import Namespace

    from lab.analyze.attention import run

    with pytest.raises(UserError, match="--windows = 0: must be at least 1"):
        run(Namespace(windows=0), tmp_path)
