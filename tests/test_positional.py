"""Every encoding of the registry: causality, cached decoding, initialization; and the formulas of RoPE and CARoPE."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import load_config
from model import GPT, KVCache
from positional import ENCODINGS, KeyBias

ALL = sorted(ENCODINGS)
T = 32


def build(encoding: str, *words: str, spread: float = 0.5) -> GPT:
    """A small model whose encoding is away from its start, so that a test sees what it does."""
    sizes = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=97", f"--block_size={T}"]
    model = GPT(load_config([*sizes, f"--encoding={encoding}", *words])).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for e in model.encodings:
            for p in e.parameters():
                p.add_(spread * torch.randn(p.shape, generator=generator))
    return model


def tokens(n: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 97, (batch, n), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("encoding", ALL)
def test_no_gradient_flows_from_a_position_to_later_tokens(encoding):
    model = build(encoding)
    x = model.wte(tokens(T)).detach().requires_grad_()
    model.wte.forward = lambda _: x  # the embeddings themselves, so that one can differentiate by them
    logits = model(tokens(T))
    for m in (0, T // 2, T - 2):
        (grad,) = torch.autograd.grad(logits[:, m].square().sum(), x, retain_graph=True)
        assert grad[:, : m + 1].abs().sum(dim=(0, 2)).min() > 0
        assert grad[:, m + 1 :].abs().max() == 0


@pytest.mark.parametrize("encoding", ALL)
def test_decoding_with_the_cache_equals_the_full_forward_also_past_the_training_length(encoding):
    model = build(encoding)
    n = min(model.max_len or 4 * T, 4 * T)  # some end, but far out
    idx = tokens(n)
    with torch.no_grad():
        full, cache = model(idx), KVCache()
        pieces = [model(idx[:, :5], cache=cache), model(idx[:, 5:9], cache=cache)]  # a prompt, and more of it
        pieces += [model(idx[:, i : i + 1], cache=cache) for i in range(9, n)]
    assert len(cache) == n
    # A running sum in the logits is known to an fp32 ulp of the whole text's
    atol = 1e-4 if isinstance(model.encodings[0], KeyBias) else 1e-5
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["rope", "carope", "carope_hidden"])
def test_long_decoding_does_not_drift(encoding):
    model = build(encoding)
    idx = tokens(3000, batch=1)
    with torch.no_grad():
        full, cache = model(idx), KVCache()
        pieces = [model(idx[:, i : i + 1], cache=cache) for i in range(idx.size(1))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=5e-4, rtol=0)


@pytest.mark.parametrize("encoding", ["carope", "carope_hidden"])
def test_phases_of_a_long_text_are_those_of_a_cache(encoding):
    """In fp32 the whole text's were off by 2e-3 radians at its end."""
    carope, n = build(encoding).encodings[0], 100_000
    x, pos = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(1)), torch.arange(n)
    with torch.no_grad():
        whole, last, parts = carope.coords(x, pos), torch.zeros(1, 1, 1, 1, dtype=torch.float64), []
        for some in pos.split(30_001):
            parts.append(carope.coords(x[:, some], some, last))
            last = parts[-1][..., -1:, :]
        torch.testing.assert_close(torch.cat(parts, dim=-2), whole, atol=1e-6, rtol=0)
        for found, wanted in zip(carope.cos_sin(whole), (whole.cos(), whole.sin()), strict=True):
            torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("encoding", ALL)
def test_every_parameter_is_initialized_and_the_rest_of_the_model_starts_the_same(encoding):
    cfg = load_config(["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=97", f"--encoding={encoding}"])
    model = GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    torch.manual_seed(cfg.seed)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    again, nope = GPT(cfg).state_dict(), GPT(cfg.model_copy(update={"encoding": "nope"})).state_dict()
    for name, p in model.state_dict().items():
        assert torch.equal(p, again[name])
        assert name not in nope or torch.equal(p, nope[name])
    assert set(nope) <= set(again)


@pytest.mark.parametrize("encoding", ALL)
def test_every_parameter_of_the_encoding_learns_from_the_start(encoding):
    model = GPT(load_config(["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=97", f"--encoding={encoding}"]))
    model(tokens(T), tokens(T).roll(-1, 1)).backward()
    for e in model.encodings:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in e.parameters())


@given(m=st.integers(0, 400), n=st.integers(0, 400), shift=st.integers(0, 4000))
@settings(max_examples=50, deadline=None)
def test_rope_scores_depend_only_on_the_distance(m, n, shift):
    rope = build("rope").wpe
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(m + n))

    def score(i: int, j: int) -> float:
        at = [rope(q, torch.tensor([position])).frame for position in (i, j)]
        return float((rope.rotate(q, at[0]) * rope.rotate(k, at[1])).sum())

    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=1e-4)


def test_carope_starts_as_rope():
    words = ["--n_layer=2", "--n_head=4", "--n_embd=256", "--vocab_size=97", "--block_size=512"]
    models = {name: GPT(load_config([*words, f"--encoding={name}"])) for name in ("rope", "carope", "carope_hidden")}
    idx = tokens(512)
    with torch.no_grad():
        for p in models["rope"].parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
        for name in ("carope", "carope_hidden"):
            models[name].load_state_dict(models["rope"].state_dict(), strict=False)
            torch.testing.assert_close(models[name](idx), models["rope"](idx), atol=1e-5, rtol=0)
        moved = models["carope"]
        moved.wpe.W.weight.add_(0.1)
        assert (moved(idx) - models["rope"](idx)).abs().max() > 1e-3


def test_the_bias_that_starts_carope_as_rope_is_the_one_of_the_summary():
    model = GPT(load_config(["--n_embd=128", "--n_head=2", "--n_layer=1", "--encoding=carope"]))
    assert model.wpe.W.bias.tolist() == pytest.approx([-0.9267] * 2, abs=5e-5)
    nobias = GPT(load_config(["--n_embd=128", "--n_head=2", "--n_layer=1", "--encoding=carope_nobias"]))
    torch.nn.init.zeros_(nobias.wpe.W.weight)
    assert nobias.wpe.frequency(torch.ones(1, 1, 128)).flatten().tolist() == pytest.approx([1 / (1 + math.log(2))] * 2)


def carope_scores(x_TC, W_CH, b_H, q_HTD, k_HTD):
    """Query-key products under CARoPE in float64, position by position as the formulas of the paper stand."""
    n, H, D = x_TC.shape[0], W_CH.shape[1], q_HTD.shape[2]
    f = 1 / (1 + np.log1p(np.exp(x_TC @ W_CH + b_H)))  # T, H
    scores = np.zeros((H, n, n))
    for h in range(H):
        for m in range(n):
            for key in range(n):
                for i in range(D // 2):
                    angle = sum(f[t, h] ** i for t in range(m + 1)) - sum(f[t, h] ** i for t in range(key + 1))
                    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                    pair = [i, i + D // 2]
                    scores[h, m, key] += k_HTD[h, key, pair] @ rotation @ q_HTD[h, m, pair]
    return scores


@pytest.mark.parametrize("encoding", [name for name in ALL if name.startswith("carope")])
def test_carope_equals_the_formula_in_numpy(encoding):
    model = build(encoding)
    carope = model.encodings[0]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 9, 32, generator=generator)
    q, k = torch.randn(2, 1, 2, 9, 16, generator=generator)
    with torch.no_grad():
        frame = carope(x, torch.arange(9)).frame
        ours = (carope.rotate(q, frame) @ carope.rotate(k, frame).mT)[0].numpy()
    given = {name: p.detach().double().numpy() for name, p in carope.named_parameters()}
    W = given.get("W.weight", np.zeros((2, 32))).T
    # f is held at θ_1 where nothing is learned: b = ln(exp(1/θ_1 − 1) − 1), for 8 pairs of base 10000
    held = np.log(np.expm1(10000 ** (1 / 8) - 1)) if not given else 0
    bias = given.get("W.bias", given.get("b", np.full(2, held)))
    expected = carope_scores(x[0].double().numpy(), W, bias, q[0].double().numpy(), k[0].double().numpy())
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("encoding", ["rope", "carope", "carope_hidden"])
def test_phases_stay_exact_under_bf16_autocast(encoding):
    carope = build(encoding).encodings[0]
    x, pos = torch.randn(1, 600, 32, generator=torch.Generator().manual_seed(1)), torch.arange(600)
    with torch.no_grad():
        expected = carope.coords(x, pos)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            phases = carope.coords(x, pos)
    assert phases.dtype in (torch.float32, torch.float64)
    assert torch.equal(phases, expected)
    assert len(phases[0, 0, :, 0].unique()) == 600  # bf16 holds 129 of the positions 256 … 511 only


def test_sinusoids_are_those_of_the_paper():
    encoding = build("sinusoidal", "--sinusoidal_scale=0.5").wpe
    added = encoding.embed(torch.zeros(1, 700, 32), torch.arange(700))[0].double().numpy()
    expected = np.zeros((700, 32))
    for i in range(16):
        angle = np.arange(700) / 10000 ** (2 * i / 32)
        expected[:, 2 * i], expected[:, 2 * i + 1] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(added, 0.5 * expected, atol=1e-6)


def test_learned_positions_end_where_the_table_ends():
    with pytest.raises(ValueError, match=rf"{T + 1} tokens.*learned.*{T} only"):
        build("learned")(tokens(T + 1))
