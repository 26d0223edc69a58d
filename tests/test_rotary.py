"""Encodings that turn queries and keys, each against its formula written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_positional import build, tokens

from core.config import load_config
from core.errors import UserError
from core.numerics import once
from model import GPT
from positional import ENCODINGS
from positional.linear import narrow_linear
from positional.rotation import turn_pairs

CAROPE = sorted(name for name in ENCODINGS if name.startswith("carope"))


def moved_alike(*encodings: str, also: tuple[str, ...] = ()) -> list[GPT]:
    """Models of these encodings, each at its start; the rest of their weights is the same, away from its start."""
    words = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--vocab_size=97", "--block_size=512", *also]
    models = [GPT(load_config([*words, f"--encoding={encoding}"])).eval() for encoding in encodings]
    with torch.no_grad():
        for model in models:
            generator = torch.Generator().manual_seed(5)
            for name, p in model.named_parameters():
                if "wpe" not in name:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return models


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([1, 3]), batch=st.sampled_from([1, 3]), heads=st.sampled_from([1, 2]), learns=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), T=st.integers(1, 9), F=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_rotation_written_out_is_the_formula(rows, batch, heads, dtype, learns, T, F, seed):
    """Values and gradients; cosines and sines of one row or head, or of all, that have a gradient or not."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, T, 2, 2 * F, generator=generator).to(dtype).transpose(1, 2).requires_grad_()  # as attention has it
    cos, sin = (torch.randn(batch, heads, T, F, generator=generator).requires_grad_(learns) for _ in range(2))
    a, b = u.float().chunk(2, dim=-1)
    plain = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(dtype)
    upstream = torch.randn(plain.shape, generator=generator).to(dtype)
    inputs = (u, cos, sin) if learns else (u,)
    ours = turn_pairs(u, cos, sin)
    assert ours.dtype == dtype
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(ours, plain, **close)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (ours, plain)), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("learns", [False, True])
def test_the_rotation_of_a_compiled_model_is_the_eager_one(learns):
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(2, 6, 2, 16, generator=generator).bfloat16().transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(1, 2, 6, 8, generator=generator).requires_grad_(learns) for _ in range(2))
    upstream = torch.randn(u.shape, generator=generator).bfloat16()
    found = []
    for turn in (turn_pairs, torch.compile(turn_pairs, backend="aot_eager", fullgraph=True)):
        turned = turn(u, cos, sin)
        found.append([turned, *torch.autograd.grad(turned, (u, cos, sin) if learns else (u,), upstream)])
    for eager, compiled in zip(*found, strict=True):
        assert eager.dtype == compiled.dtype
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=2**-8)


def test_compiled_in_fp32_the_layer_before_the_rotation_has_its_gradient():
    """Under torch 2.11 it was all zeros, as a conversion that changes nothing was the last thing that the function did."""

    def rotated(packed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k = packed.view(2, 16, 2, 2, 8).permute(2, 0, 3, 1, 4)
        return turn_pairs(q, cos, sin) * turn_pairs(k, cos, sin)

    torch.manual_seed(1)
    angle, source = torch.randn(1, 1, 16, 4), torch.randn(2, 16, 32)
    weight = torch.randn(2, 2, 16, 8)
    gradients = []
    for function in (rotated, torch.compile(rotated, backend="aot_eager", fullgraph=True)):
        packed = source.clone().requires_grad_()
        (function(packed, angle.cos(), angle.sin()) * weight).sum().backward()
        gradients.append(packed.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[1].norm() > 1


TABLES = ["rope", "rope_bf16pos", "partial_rope", "xpos", "carope_scalar", "carope_frozen", "sinusoidal", "alibi"]


@pytest.mark.parametrize("encoding", TABLES)
def test_a_compiler_finds_the_positions_tables_in_memory(encoding):
    """Else it would compute angles, in float64, in each kernel that reads them: 48 times a micro-step of GPT-Small."""
    model, idx, graphs = build(encoding), tokens(24, batch=4), []

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(model, backend=backend, fullgraph=True)(idx)
        torch.testing.assert_close(found, model(idx), atol=0.1, rtol=0.1)
    tables, wide = 0, set()
    for node in graphs[0].graph.nodes:
        if "in_memory" in str(node.target):
            tables += 1
            continue
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and (value.dtype == torch.float64 or wide & set(node.all_input_nodes)):
            wide.add(node)
            assert value.numel() <= 24 * 32, node  # float64 has reached what each sequence has of its own
    assert tables and len(graphs) == 1


def test_what_is_no_table_stays_what_it_is():
    """A frame may be anything that an encoding's own `rotate` reads."""
    frame = (torch.ones(1, 3), torch.ones(2, 3), None, 5, {"a": torch.ones(1)}, torch.tensor(2.0))
    found = torch.compile(once, backend="eager", fullgraph=True)(frame)
    assert found[1] is frame[1] and found[2:4] == (None, 5) and found[4].keys() == {"a"} and found[5] == 2
    assert torch.equal(found[0], frame[0]) and found[0] is not frame[0] and once(frame) == frame


@pytest.mark.parametrize("bf16", [False, True])
def test_the_layer_of_f_is_fp32_and_its_gradients_as_good_as_autocast_s(bf16):
    layer, generator = torch.nn.Linear(64, 4), torch.Generator().manual_seed(1)
    x = torch.randn(2, 300, 64, generator=generator).requires_grad_()
    upstream = torch.randn(2, 300, 4, generator=generator)
    inputs = (x, layer.weight, layer.bias)
    wanted = layer.double()(x.double())
    exact = torch.autograd.grad(wanted, inputs, upstream.double())
    layer.float()
    for net in (narrow_linear, torch.compile(narrow_linear, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z = net(layer, x)
        assert z.dtype == torch.float32
        torch.testing.assert_close(z.double(), wanted, atol=1e-5, rtol=1e-5)
        for found, true in zip(torch.autograd.grad(z, (x, layer.weight, layer.bias), upstream), exact, strict=True):
            assert (found - true).norm() < (2**-8 if bf16 and net is not narrow_linear else 1e-6) * true.norm()


@pytest.mark.parametrize("encoding", ["carope_frozen", "carope_scalar", "carope_per_layer", "carope_hidden_shared"])
def test_what_starts_as_rope_has_its_logits(encoding):
    rope, ours = moved_alike("rope", encoding)
    idx = tokens(512, batch=1)
    with torch.no_grad():
        expected = rope(idx)
        torch.testing.assert_close(ours(idx), expected, atol=2e-5, rtol=0)
        if encoding == "carope_frozen":
            assert ours.n_params()["encoding"] == 0
            return
        for p in ours.encodings[0].parameters():
            p.add_(0.1)
        assert (ours(idx) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("encoding", "sets", "reads_raw"),
    [("carope", 1, True), ("carope_per_layer", 2, True), ("carope_hidden_shared", 1, False), ("carope_hidden", 2, False)],
)
def test_embedding_or_hidden_state_and_one_w_or_one_per_layer(encoding, sets, reads_raw):
    model = build(encoding)
    assert len(model.encodings) == sets and model.n_params()["encoding"] == sets * (32 * 2 + 2)
    seen = []
    for one in model.encodings:
        one.logit = lambda x, own=one, known=one.logit: seen.append((own, x)) or known(x)
    idx = tokens(8, batch=1)
    with torch.no_grad():
        model(idx)
        raw = model.wte(idx)
        first = model.h[0].ln_1(raw)
    own = [one for one, _ in seen]
    assert own == (model.encodings if sets == 2 else model.encodings * (1 if reads_raw else 2))
    torch.testing.assert_close(seen[0][1], raw if reads_raw else first)
    for _, x in seen[1:]:
        assert torch.equal(x, raw) is reads_raw and not torch.equal(x, first)


@pytest.mark.parametrize("encoding", CAROPE)
def test_health_is_that_of_f(encoding):
    model = build(encoding)
    health, complaint = model.health(tokens(24))
    fs = []
    for one in model.encodings:
        one.frequency = lambda x, known=one.frequency: fs.append(known(x)) or fs[-1]
    with torch.no_grad():
        model(tokens(24))
    phases = [f.expand(-1, -1, 24).double().sum(-1) for f in fs]
    assert health["f_mean"] == pytest.approx(np.mean([f[..., 1:].mean().item() for f in fs]), rel=1e-4)
    assert health["phase_min"] == pytest.approx(min(phase.min().item() for phase in phases), rel=1e-4)
    assert health["phase_max"] == pytest.approx(max(phase.max().item() for phase in phases), rel=1e-4)
    assert complaint is None


def test_a_scalar_f_is_healthy_unless_nothing_turns():
    model = build("carope_scalar", spread=0)
    assert model.health(tokens(24))[1] is None
    with torch.no_grad():
        model.wpe.b.fill_(200.0)
    assert "collapsed to 0.005" in model.health(tokens(24))[1]


def frequencies(n: int, base: float = 10000.0) -> np.ndarray:
    return np.array([base ** (-i / n) for i in range(n)])


def turned(u_TD: np.ndarray, angle_TF: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """u with the two channels of each pair turned as a complex number, one token and one pair at a time."""
    found = u_TD.copy()
    for t in range(len(u_TD)):
        for (i, j), angle in zip(pairs, angle_TF[t], strict=True):
            z = complex(u_TD[t, i], u_TD[t, j]) * np.exp(1j * angle)
            found[t, i], found[t, j] = z.real, z.imag
    return found


def both_turned(encoding: str, *words: str, n: int = 40) -> tuple[np.ndarray, ...]:
    """q, k before and after they are turned to positions 0 … n − 1, of one head of width 16."""
    one = build(encoding, *words).encodings[0]
    q, k = torch.randn(2, 1, 2, n, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        after = one.turn(q, k, one(torch.zeros(1, n, 32), torch.arange(n)).frame)
    return tuple(u[0, 0].double().numpy() for u in (q, k, *after))


@pytest.mark.parametrize(("fraction", "n"), [(0.25, 2), (0.5, 4), (0.7, 5), (1.0, 8)])
def test_partial_rope_turns_the_first_channels_on_their_own_ladder(fraction, n):
    q, k, q_after, k_after = both_turned("partial_rope", f"--partial_rope_fraction={fraction}")
    angles = np.arange(40)[:, None] * frequencies(n)
    for before, after in ((q, q_after), (k, k_after)):
        np.testing.assert_allclose(after, turned(before, angles, [(i, i + n) for i in range(n)]), atol=1e-6)
        assert np.array_equal(after[:, 2 * n :], before[:, 2 * n :])


@pytest.mark.parametrize(("fraction", "n"), [(0.25, 2), (0.75, 6), (1.0, 8)])
def test_partial_rope_of_kind_high_is_rope_without_its_slowest_pairs(fraction, n):
    words = [f"--partial_rope_fraction={fraction}", "--partial_rope_kind=high"]
    q, k, q_after, k_after = both_turned("partial_rope", *words)
    angles = np.arange(40)[:, None] * frequencies(8)[:n]
    for before, after in ((q, q_after), (k, k_after)):
        np.testing.assert_allclose(after, turned(before, angles, [(i, i + 8) for i in range(n)]), atol=1e-6)


def test_partial_rope_without_a_pair_to_turn_is_refused():
    with pytest.raises(UserError, match=r"partial_rope_fraction = 0.1.* = 16; from 2 / 16 on"):
        build("partial_rope", "--partial_rope_fraction=0.1")


def test_xpos_scores_are_those_of_rope_faded_by_the_distance():
    q, k, q_after, k_after = both_turned("xpos", "--xpos_scale_base=20")
    ours = q_after @ k_after.T
    for n in range(40):
        for m in range(n + 1):
            expected = 0.0
            for i in range(8):
                zeta = (2 * i / 16 + 0.4) / 1.4
                z = complex(q[n, i], q[n, i + 8]) * complex(k[m, i], k[m, i + 8]).conjugate()
                expected += zeta ** ((n - m) / 20) * (z * np.exp(1j * (n - m) * 10000 ** (-i / 8))).real
            assert ours[n, m] == pytest.approx(expected, abs=1e-5)


def test_xpos_is_finite_to_its_end_and_not_trained_beyond_it():
    model = build("xpos", "--xpos_scale_base=0.6")
    end = model.max_len
    assert end == 35  # 0.6 · 106 ln 2 / ln 3.5
    _, _, q_after, k_after = both_turned("xpos", "--xpos_scale_base=0.6", n=end)
    assert np.abs(q_after[-1]).min() > 2.0**-126 and np.abs(k_after).max() < 2.0**110
    model(tokens(end), tokens(end).roll(-1, 1)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"36 tokens.*xpos.*35 only"):
        model(tokens(36))
    with pytest.raises(UserError, match=r"block_size = 40000: with xpos_scale_base = 512 .* after 30028 tokens"):
        build("xpos", "--block_size=40000", "--tokens_per_step=40000", "--micro_batch=1")


def test_bf16_positions_256_to_511_give_129_rotations():
    one = build("rope_bf16pos").wpe
    cos, sin = one(torch.zeros(1, 512, 32), torch.arange(512)).frame
    rotations = torch.cat((cos, sin), dim=-1)[0, 0]
    assert len(rotations[:257].unique(dim=0)) == 257 and len(rotations[256:].unique(dim=0)) == 129
    exact = build("rope").wpe
    expected = exact(torch.zeros(1, 512, 32), torch.arange(512)).frame[0]
    assert torch.equal(cos[:, :, :257], expected[:, :, :257]) and not torch.equal(cos, expected)


@pytest.mark.parametrize("block", [2, 8, 16])
def test_comrope_starts_as_rope_and_leaves_it(block):
    rope, ours = moved_alike("rope", "comrope", also=(f"--comrope_block={block}",))
    idx = tokens(512, batch=1)
    with torch.no_grad():
        expected = rope(idx)
        torch.testing.assert_close(ours(idx), expected, atol=1e-5, rtol=0)
        ours.encodings[0].angles.add_(0.02)
        assert (ours(idx) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("block", [2, 4, 8])
def test_comrope_turns_by_the_matrix_exponential_of_its_angles(block):
    one = build("comrope", f"--comrope_block={block}").encodings[0]
    with torch.no_grad():
        A_HNbb = one.matrices()
    assert torch.equal(A_HNbb, -A_HNbb.mT) and A_HNbb.shape == (2, 16 // block, block, block)
    q, k, q_after, k_after = both_turned("comrope", f"--comrope_block={block}")
    order = [channel for i in range(8) for channel in (i, i + 8)]  # block n holds pairs nb/2 …, each (i, i + D/2)
    whole = torch.block_diag(*A_HNbb[0])

    def R(m: int) -> np.ndarray:
        return torch.matrix_exp(m * whole).numpy()

    for before, after in ((q, q_after), (k, k_after)):
        expected = np.stack([R(m + 1) @ before[m, order] for m in range(40)])
        np.testing.assert_allclose(after[:, order], expected, atol=2e-6)
    np.testing.assert_allclose(R(3) @ R(17), R(20), atol=1e-12)
    for n, m in ((39, 0), (20, 13), (5, 5)):
        expected = (R(n - m) @ q[n, order]) @ k[m, order]  # R(m)ᵀ = R(−m): only the distance is left
        assert (q_after @ k_after.T)[n, m] == pytest.approx(expected, abs=1e-5)


def test_comrope_stays_orthogonal_far_out():
    one = build("comrope").encodings[0]
    with torch.no_grad():
        R = one.coords(torch.zeros(1, 4096, 32), torch.arange(4096))[0, :, -1].view(2, 2, 8, 8)
    torch.testing.assert_close(R @ R.mT, torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8), atol=1e-10, rtol=0)
    torch.testing.assert_close(R, torch.matrix_exp(4096 * one.matrices().detach()), atol=1e-9, rtol=0)


def test_comrope_blocks_must_fit_the_head():
    with pytest.raises(UserError, match=r"comrope_block = 6: must be even .* = 16; these do: 2, 4, 8, 16"):
        build("comrope", "--comrope_block=6")


@pytest.mark.parametrize("encoding", ["rope_bf16pos", "partial_rope", "xpos", "comrope"])
def test_what_changes_rotation_gets_no_kernel_of_its_parent(encoding):
    assert not any(getattr(one, "kernel", None) for one in build(encoding, "--kernel=triton").encodings)
