"""Perplexity: every token once, the same tokens at every length, whatever the batch size and the ranks."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run_command, torchrun
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.checkpoint import load_model
from core.config import load_config
from core.data import TokenStream
from core.distributed import Distributed
from core.evaluate import Evaluation, Windows, evaluate, losses
from core.profile import Profile, bins
from eval_ppl import evaluate_run, render
from model import GPT

CPU = Distributed(torch.device("cpu"), torch.float32)


def by_hand(model, tokens: np.ndarray, length: int) -> tuple[list[float], list[list[float]]]:
    """Each target's negative log-likelihood, one window after the other, and the same by window."""
    windows = []
    for first in range(0, len(tokens) - 1, length):
        piece = torch.from_numpy(tokens[first : first + length + 1].astype(np.int64))
        with torch.no_grad():
            logp = model(piece[None, :-1])[0].double().log_softmax(-1)
        windows.append((-logp.gather(1, piece[1:, None])[:, 0]).tolist())
    return [nll for window in windows for nll in window], windows


def test_a_perplexity_beyond_floating_point_is_infinite():
    assert Evaluation(800.0, 1.0, 10).perplexity == math.inf and math.isnan(Evaluation(math.nan, 1.0, 10).perplexity)


@pytest.mark.parametrize("length", [1, 20, 32, 100])
def test_evaluation_equals_the_definition(runs, corpus, length):
    model, _, _ = load_model(runs / "carope")
    stream = TokenStream(corpus, "val", 320)
    found = evaluate(model, stream, length, 7, CPU, max_tokens=750)
    nll, windows = by_hand(model, stream.read(0, 751), length)
    assert found.tokens == len(nll) == 750
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    sums, sizes = np.array([sum(w) for w in windows]), np.array([len(w) for w in windows])
    residual = sums - found.nll * sizes
    expected = math.sqrt(len(windows) / (len(windows) - 1) * (residual**2).sum()) / 750
    assert found.nll_stderr == pytest.approx(expected, rel=1e-5)
    assert found.stderr == pytest.approx(found.perplexity * expected, rel=1e-5)


class Recorder(torch.nn.Module):
    """Stands in for a model: its losses are the targets, so that sums tell which were asked for."""

    def forward(self, x_BT, y_BT, reduction):
        assert reduction == "none" and torch.equal(x_BT[:, 1:], y_BT[:, :-1])
        return y_BT.double()


@given(length=st.integers(1, 70), batch=st.integers(1, 9), max_tokens=st.integers(2, 5_000), world_size=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
@example(length=64, batch=8, max_tokens=30_000, world_size=3)  # more than there are
def test_every_target_is_predicted_exactly_once(corpus, length, batch, max_tokens, world_size):
    stream = TokenStream(corpus, "val", 320)
    total = 0.0
    for rank in range(world_size):
        dist = Distributed(torch.device("cpu"), torch.float32)
        dist.rank, dist.world_size = rank, world_size
        found = evaluate(Recorder(), stream, length, batch, dist, max_tokens)
        total += found.nll * found.tokens
    n = min(max_tokens, len(stream) - 1)
    assert found.tokens == n
    assert total == pytest.approx(float(stream.read(1, n).astype(np.int64).sum()))


def slid_by_hand(model, tokens: np.ndarray, length: int, stride: int) -> list[float]:
    """Each target's loss, from the window in which it counts: target by target as the definition stands."""
    found = []
    for target in range(1, len(tokens)):
        window = 0 if target <= length else math.ceil((target - length) / stride)  # the first window that reaches it
        piece = torch.from_numpy(tokens[window * stride : target].astype(np.int64))
        with torch.no_grad():
            found.append(-model(piece[None])[0, -1].double().log_softmax(-1)[int(tokens[target])].item())
    return found


@pytest.mark.parametrize(("length", "stride"), [(32, 8), (40, 39), (20, 1), (100, 30)])
def test_sliding_windows_equal_the_definition(runs, corpus, length, stride):
    model, _, _ = load_model(runs / "carope")
    stream = TokenStream(corpus, "val", 320)
    found = evaluate(model, stream, length, 7, CPU, max_tokens=60, stride=stride)
    assert found.tokens == 60
    assert found.nll == pytest.approx(np.mean(slid_by_hand(model, stream.read(0, 61), length, stride)), rel=1e-6)


@given(
    length=st.integers(1, 70), slide=st.integers(1, 70), batch=st.integers(1, 9), max_tokens=st.integers(2, 5000),
    world_size=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_target_counts_exactly_once_in_sliding_windows(corpus, length, slide, batch, max_tokens, world_size):
    stream, stride = TokenStream(corpus, "val", 320), min(slide, length)
    total = 0.0
    for rank in range(world_size):
        dist = Distributed(torch.device("cpu"), torch.float32)
        dist.rank, dist.world_size = rank, world_size
        found = evaluate(Recorder(), stream, length, batch, dist, max_tokens, stride=stride)
        total += found.nll * found.tokens
    assert total == pytest.approx(float(stream.read(1, max_tokens).astype(np.int64).sum()))
    windows = Windows(max_tokens, length, stride)
    assert windows.sizes(CPU.device).sum() == max_tokens and windows.sizes(CPU.device).min() > 0


@pytest.mark.parametrize(("length", "n"), [(32, 750), (100, 780), (5, 5)])
def test_the_loss_against_position_equals_the_definition(runs, corpus, length, n):
    model, _, _ = load_model(runs / "carope")
    stream = TokenStream(corpus, "val", 320)
    profile = Profile(length, CPU.device)
    evaluate(model, stream, length, 4, CPU, n, profile=profile)
    _, windows = by_hand(model, stream.read(0, n + 1), length)
    for record in profile.summary():
        first, last = record["from"], record["to"]
        means = [np.mean(w[first - 1 : last]) for w in windows if len(w) >= last]
        assert record["windows"] == len(means) and record["loss"] == pytest.approx(np.mean(means), rel=1e-5)
        if len(means) == 1:
            assert record["stderr"] is None
        else:
            assert record["stderr"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-4)


@given(st.integers(1, 20_000))
def test_bins_of_positions_leave_none_out(length):
    found = bins(length)
    assert [p for first, last in found for p in range(first, last + 1)] == list(range(1, length + 1))
    assert found[:4] == [(1, 1), (2, 2), (3, 3), (4, 4)][: len(found[:4])] and len(found) <= 4 * math.log2(length) + 2


def test_a_long_window_of_attention_written_out_is_evaluated_in_pieces(corpus, monkeypatch):
    model = GPT(
        load_config(["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=32", "--vocab_size=320", "--encoding=cope"])
    )
    x_BT, y_BT = Windows(200, 100, 100).read(TokenStream(corpus, "val", 320), 0, 2, 100, CPU.device)
    with torch.no_grad():
        model.h[0].wpe.e.normal_()
        whole = losses(model, x_BT, y_BT)
        monkeypatch.setattr("core.evaluate.PIECE", 32)
        most = []
        model.h[0].register_forward_pre_hook(lambda _, args: most.append(args[0].size(1)))
        torch.testing.assert_close(losses(model, x_BT, y_BT), whole, atol=1e-5, rtol=0)
    assert most == [32, 32, 32, 4]


def test_result_does_not_depend_on_batch_size_or_ranks(runs, tmp_path):
    words = ["eval_ppl.py", runs / "carope", "--lengths", 32, 64, "--max_tokens", 5000, "--device", "cpu"]
    words += ["--stride", 20, "--per_position", "--json"]
    commands = [
        run_command(*words, tmp_path / "a.json", "--batch", 3),
        run_command(*words, tmp_path / "b.json", "--batch", 64),
        torchrun(2, *words, tmp_path / "c.json", "--batch", 5),
    ]
    assert [c.returncode for c in commands] == [0, 0, 0], commands[-1].stderr
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    for key in ("nll", "perplexity", "stderr"):
        expected = [result.pop(key) for result in a]
        assert expected == pytest.approx([result.pop(key) for result in b], rel=1e-5)
        assert expected == pytest.approx([result.pop(key) for result in c], rel=1e-5)
    for curves in zip(*([r.pop("per_position") for r in results] for results in (a, b, c)), strict=True):
        loss = [[(bin["loss"], bin["stderr"], bin["windows"]) for bin in curve] for curve in curves]
        for one in loss[1:]:
            np.testing.assert_allclose(np.array(one, dtype=float), np.array(loss[0], dtype=float), rtol=1e-5)
    assert a == b == c  # all the rest to the letter


def test_the_table_and_its_json(runs, tmp_path):
    file = tmp_path / "out.json"
    done = run_command(
        "eval_ppl.py", runs / "learned", runs / "carope", "--lengths", 16, 32, 64, "--max_tokens", 3000, "--json", file,
        "--figure", tmp_path / "position.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert [(r["run"], r["length"]) for r in results] == [(e, n) for e in ("learned", "carope") for n in (16, 32, 64)]
    keys = {"run", "encoding", "n_params", "length", "tokens", "nll", "perplexity", "stderr", "step", "dtype", "git"}
    assert all(keys <= set(r) for r in results)
    assert (tmp_path / "position.png").read_bytes().startswith(b"\x89PNG")
    beyond = results[2]
    assert beyond["perplexity"] is beyond["nll"] is beyond["stderr"] is None
    whole = [r for r in results if r is not beyond]
    assert {r["tokens"] for r in whole} == {3000} and {r["step"] for r in whole} == {30}
    assert all(r["perplexity"] == pytest.approx(math.exp(r["nll"])) for r in whole)
    learned, carope = done.stdout.splitlines()[1:3]
    assert learned.split()[:3] == ["learned", "learned", "30"] and learned.split()[-1] == "–"
    assert f"{results[3]['perplexity']:.2f} ± {results[3]['stderr']:.2f}" in carope


def test_the_standard_error_of_one_window_is_unknown(runs):
    (result,) = evaluate_run(runs / "carope", [64], CPU, max_tokens=64)
    assert result["stderr"] is None
    assert render([result]).splitlines()[1].split()[-1] == f"{result['perplexity']:.2f}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such run or checkpoint"),
        (["{corpus}"], "no valid checkpoint in it"),
        (["{run}", "--lengths", "0"], "--lengths = 0: must be at least 1"),
        (["{run}", "--stride", "20", "--lengths", "16", "32"], "at most the shortest of --lengths = 16"),
        (["{run}", "--figure", "nowhere/a.png"], "nowhere/a.png: its folder is not there"),
        (["{run}", "--data", "nowhere"], "nowhere: no such data folder"),
        (["{run}", "--losses", "nowhere/a.npz"], "nowhere/a.npz: its folder is not there"),
        (["{run}", "--documents", "0"], "--documents = 0: must be at least 1"),
        (["{run}", "--lengths", "64,128"], "numbers of a list are given with spaces between them"),
        (["{run}", "--documents", "30000"], "--documents = 30000: the longest of the 9 documents in"),
    ],
)
def test_refusals(runs, corpus, words, message):
    done = run_command("eval_ppl.py", *(word.format(run=runs / "carope", corpus=corpus) for word in words))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
