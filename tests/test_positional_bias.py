"""Encodings that bias the logits: their formulas, written out in float64 or known from elsewhere."""

import math

import numpy as np
import pytest
import torch
from test_positional import build

from core.config import load_config
from core.errors import UserError
from model import GPT
from positional.bias import alibi_slopes


def t5_bucket(distance: int, n_buckets: int = 32, max_distance: int = 128) -> int:
    """Written out, one distance at a time."""
    exact = n_buckets // 2
    if distance < exact:
        return distance
    steps = math.log(distance / exact) / math.log(max_distance / exact) * (n_buckets - exact)
    return min(n_buckets - 1, exact + math.floor(steps))


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(1).tolist() == [2**-8]
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    twelve = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    twelve += [0.7071067811865476, 0.35355339059327379, 0.17677669529663689, 0.088388347648318447]
    assert alibi_slopes(12).tolist() == pytest.approx(twelve, rel=1e-15)
    assert len(alibi_slopes(10)) == 10 and alibi_slopes(10)[8:].tolist() == pytest.approx(twelve[8:10])
    sixteen = alibi_slopes(16).tolist()
    assert sixteen[0] == pytest.approx(2**-0.5) and sixteen[15] == pytest.approx(2**-8)


def test_alibi_takes_a_slope_per_token_off_the_logits():
    alibi = GPT(load_config(["--n_layer=1", "--n_head=8", "--n_embd=32", "--vocab_size=97", "--encoding=alibi"])).wpe
    c = alibi.key_bias(alibi.coords(torch.zeros(1, 5, 32), torch.arange(3, 8)))
    for h in range(8):
        wanted = [[-(i - j) / 2 ** (h + 1) for j in range(5)] for i in range(5)]
        np.testing.assert_array_equal((c[0, h, None, :] - c[0, h, :, None]).numpy(), wanted)


def test_t5_buckets():
    model = build("t5")
    table = model.wpe.table_NH.detach()
    found = model.wpe.distance_bias(1000)
    for distance in range(1000):
        assert torch.equal(found[:, distance], table[t5_bucket(distance)]), distance
    known = {0: 0, 15: 15, 16: 16, 18: 16, 19: 17, 32: 21, 64: 26, 112: 30, 113: 31, 127: 31, 128: 31, 999: 31}
    assert {distance: t5_bucket(distance) for distance in known} == known
    other = build("t5", "--t5_buckets=8", "--t5_max_distance=64").wpe  # 4·2^k begins a bucket: rounding must not move it
    for distance, bucket in {3: 3, 4: 4, 7: 4, 8: 5, 15: 5, 16: 6, 32: 7, 63: 7, 64: 7}.items():
        assert torch.equal(other.distance_bias(70)[:, distance], other.table_NH[bucket])


def test_t5_is_refused_where_its_buckets_reach_too_far():
    with pytest.raises(UserError, match=r"t5_max_distance = 16: half of t5_buckets = 32 .* more than 16"):
        load_config(["--encoding=t5", "--t5_max_distance=16"])


def test_t5_buckets_are_those_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    theirs = t5.T5Attention._relative_position_bucket(
        -torch.arange(3000), bidirectional=False, num_buckets=32, max_distance=128
    )
    assert theirs.tolist() == [t5_bucket(distance) for distance in range(3000)]


def kerple(kind: str, model: GPT) -> tuple[torch.nn.Module, np.ndarray, np.ndarray]:
    """The one module of all layers, and its r1 and r2."""
    (encoding,) = model.encodings
    raw1, raw2 = (r.detach().double().numpy() for r in (encoding.r1_H, encoding.r2_H))
    return encoding, np.log1p(np.exp(raw1)), np.log1p(np.exp(raw2)) if kind == "log" else 2 / (1 + np.exp(-raw2))


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_equals_the_formula_in_numpy(kind):
    encoding, r1, r2 = kerple(kind, build("kerple", f"--kerple_kernel={kind}"))
    falls = {"log": lambda a, b, d: a * np.log(1 + b * d), "power": lambda a, b, d: a * d**b}[kind]
    wanted = [[-falls(a, b, d) for d in range(50)] for a, b in zip(r1, r2, strict=True)]
    bias = encoding.distance_bias(50)
    np.testing.assert_allclose(bias.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    bias.sum().backward()
    assert encoding.r1_H.grad.isfinite().all() and encoding.r2_H.grad.isfinite().all()  # 0 to a power, at distance 0


@pytest.mark.parametrize(("kind", "most"), [("log", (2, 1)), ("power", (1, 2))])
def test_kerple_starts_where_its_authors_start(kind, most):
    words = ["--n_layer=1", "--n_head=512", "--n_embd=1024", "--vocab_size=97", "--encoding=kerple", f"--kerple_kernel={kind}"]
    _, *found = kerple(kind, GPT(load_config(words)))
    for r, limit in zip(found, most, strict=True):
        assert 0 < r.min() < 0.1 * limit and 0.9 * limit < r.max() <= limit and r.mean() == pytest.approx(limit / 2, rel=0.1)


@pytest.mark.parametrize("threshold", [-0.01, 1.3])  # below some of the queries, beyond all
def test_fire_equals_the_formula_in_numpy(threshold):
    fire = build("fire", "--fire_width=7").encodings[1]
    with torch.no_grad():
        fire.threshold.fill_(threshold)
        found = fire.bias(*(fire.coords(torch.zeros(1, n, 32), torch.arange(20 - n, 20)) for n in (6, 20)))[0]
    p = {name: value.detach().double().numpy() for name, value in fire.named_parameters()}
    psi = lambda x: math.log(abs(p["c"][0]) * x + 1)  # noqa: E731
    for t, i in enumerate(range(14, 20)):
        for j in range(i + 1):
            x = psi(i - j) / psi(max(512 * abs(threshold), i))
            hidden = np.maximum(p["fc.weight"][:, 0] * x + p["fc.bias"], 0)
            np.testing.assert_allclose(found[:, t, j], p["proj.weight"] @ hidden + p["proj.bias"], rtol=1e-4, atol=1e-5)


def key_differences(encoding: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    """What the logit of query i and key j grows by, (B, H, T, T)."""
    with torch.no_grad():
        c = encoding.key_bias(encoding.coords(x, torch.arange(x.size(1))))
    return (c[..., None, :] - c[..., :, None]).numpy()


@pytest.mark.parametrize("encoding", ["cable", "fox"])
def test_context_biases_equal_the_formula_in_numpy(encoding):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    for one in build(encoding).encodings:
        z = x.double().numpy() @ one.W.weight.detach().double().numpy().T + one.W.bias.detach().double().numpy()
        gain = np.log(1 / (1 + np.exp(-z))) if encoding == "fox" else -np.log(1 + np.exp(z))
        found = key_differences(one, x)
        for i in range(9):
            for j in range(i + 1):
                np.testing.assert_allclose(found[:, :, i, j], gain[:, j + 1 : i + 1].sum(1), rtol=1e-5, atol=1e-5)


def test_cable_and_fox_are_twins():
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(2))
    cable, fox = build("cable").encodings[0], build("fox").encodings[0]
    with torch.no_grad():
        for theirs, ours in zip(cable.parameters(), fox.parameters(), strict=True):
            theirs.copy_(-ours)
    np.testing.assert_array_equal(key_differences(cable, x), key_differences(fox, x))


@pytest.mark.parametrize("encoding", ["cable", "fox"])
def test_running_sums_stay_exact_under_bf16_autocast_and_over_a_long_text(encoding):
    one = build(encoding).encodings[0]
    x, pos = torch.randn(1, 4000, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4000)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = one.coords(x, pos)
        assert torch.equal(found, one.coords(x, pos))
        np.testing.assert_allclose(found[..., 0], one.decay(x).numpy().astype(float).cumsum(-1), rtol=1e-14)


@pytest.mark.parametrize("encoding", ["cable", "fox"])
def test_a_collapsed_decay_is_reported(encoding):
    model = build(encoding)
    idx = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(3))
    health, complaint = model.health(idx)
    assert health["f_mean"] > 0 and health["f_std_min"] > 0 and complaint is None
    for one in model.encodings:
        torch.nn.init.zeros_(one.W.weight)
    assert "collapsed" in model.health(idx)[1]
