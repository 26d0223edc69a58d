"""Newer rotations, HoPE to PoPE: logits and gradients against formulas in float64, and what they start as."""

import json
import math

import pytest
import torch
from conftest import run_command
from test_positional import build, tokens
from test_rotary import moved_alike
from torch import Tensor
from torch.nn import functional

from core.checkpoint import load_model
from core.config import load_config
from core.errors import UserError
from model import GPT, KVCache
from positional.slow_pairs import FoPE

L, H, D, F, BASE = 512, 2, 16, 8, 10000.0
THETA = torch.tensor([BASE ** (-2 * i / D) for i in range(F)], dtype=torch.float64)
Parameters = dict[str, Tensor]

ARMS = [
    "hope", "hope --rope_base=500000", "darope", "fope", "fope --fope_gain=2",
    "selective_rope", "selective_rope --selective_bias=true",
    "selective_rope --selective_gate=true --selective_rank=3", "selective_rope --selective_bias=true --selective_gate=true",
    "grape_m", "grape_m --grape_per_head=true", "grape_m --grape_planes=learned", "grape_m_ctx",
    "grape_m_ctx --grape_clock_per_head=true --grape_clock_start=1", "grape_m_ctx --grape_planes=learned --grape_per_head=true",
    "grape_m --grape_log_scale=16", "grape_m_ctx --grape_clock=sigmoid --grape_clock_start=0.394", "pope",
    "pope --pope_delta=uniform",
]  # fmt: skip


def built(arm: str) -> GPT:
    encoding, *words = arm.split()
    return build(encoding, f"--block_size={L}", *words, spread=0.2)


def unit(x_BTC: Tensor) -> Tensor:
    """Each head's channels divided by their length."""
    heads = x_BTC.unflatten(-1, (H, -1))
    return (heads / (heads.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)


def phases(arm: str, p: Parameters, x: Tensor) -> Tensor:
    """Angles of the pairs, (B or 1, H or 1, T, F), from the definitions, with parameters `p` and inputs `x` in float64."""
    m = torch.arange(x.size(1), dtype=torch.float64)
    theta = THETA if "500000" not in arm else torch.tensor([500000.0 ** (-2 * i / D) for i in range(F)], dtype=torch.float64)
    slow = theta < 2 * math.pi / L
    if arm.startswith("hope"):
        return (m[:, None] * torch.where(slow, 0, theta))[None, None]
    if arm.startswith("darope"):
        inside = ((m + 0.5) / L).clamp(1e-6, 1 - 1e-6)
        beta = (inside / (1 - inside)).log()
        z = torch.einsum("btc,hc->bht", x, p["w.weight"]) + p["alpha"][:, None] * beta
        c = L / (1 + (-z).exp())
        return torch.where(slow, c[..., None] * theta, m[:, None] * theta)
    if arm.startswith("selective"):
        h = unit(x)
        u = h @ p["down.weight"].T @ p["up.weight"].T
        phi = functional.conv1d(functional.pad(u.mT, (3, 0)), p["filter"][:, None], groups=H * F).mT
        if "bias" in p:
            phi = phi + p["bias"].exp()
        phi = phi.unflatten(-1, (H, F)).transpose(1, 2)
        if "gate.weight" in p:
            phi = phi * (h @ p["gate.weight"].T + p["gate.bias"]).sigmoid().mT[..., None]
        return phi.cumsum(-2) * theta
    omega = (p["log_omega"] / (16 if "log_scale" in arm else 1)).exp().view(-1, 1, F)
    if "ctx" not in arm:
        return (m[:, None] * omega)[None]
    z = x @ p["clock.weight"].T + p["clock.bias"]
    step = (1 / (1 + (-z / 16).exp()) if "sigmoid" in arm else functional.softplus(z)).mT
    before = torch.cat((torch.zeros_like(step[..., :1]), step[..., :-1]), dim=-1)
    return before.cumsum(-1)[..., None] * omega


def waves(arm: str, one: torch.nn.Module, p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the pairs."""
    if not isinstance(one, FoPE):
        phase = phases(arm, p, x)
        return phase.cos(), phase.sin()
    fast = [theta for theta in THETA.tolist() if theta >= 2 * math.pi / L]
    cos, sin = torch.ones(2, 1, H, x.size(1), F, dtype=torch.float64)
    for i in range(min(len(fast), D // 4)):
        angle = torch.arange(x.size(1), dtype=torch.float64)[:, None] * torch.tensor(fast, dtype=torch.float64)
        for h in range(H):
            cos[0, h, :, i] = angle.cos() @ one.of_cos[h, :, i].double()
            sin[0, h, :, i] = angle.sin() @ one.of_sin[h, :, i].double()
    return cos, sin


def axes(p: Parameters) -> Tensor | None:
    """Rows that span the planes, (H, D, D): the exponential of a skew matrix, here by its Taylor series."""
    if "skew" not in p:
        return None
    A = torch.zeros(H, D, D, dtype=torch.float64)
    k = 0
    for row in range(D):
        for column in range(row):
            for h in range(H):
                value = p["skew"].view(H, -1)[h, k]
                A = A.index_put(tuple(map(torch.tensor, (h, row, column))), value, accumulate=True)
                A = A.index_put(tuple(map(torch.tensor, (h, column, row))), -value, accumulate=True)
            k += 1
    term = total = torch.eye(D, dtype=torch.float64).expand(H, D, D)
    for n in range(1, 40):
        term = term @ A / n
        total = total + term
    return total


def formula(arm: str, one: torch.nn.Module, p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """q · k after the rotation, (B, H, T, T): each pair as a complex number where it is a rotation."""
    if arm.startswith("pope"):  # √2 of it: attention divides by the root of 2D
        m, theta = torch.arange(x.size(1), dtype=torch.float64), torch.tensor([BASE ** (-c / D) for c in range(D)]).double()
        delta, logits = p["delta"].clamp(-2 * math.pi, 0).view(H, D), torch.zeros(())
        for c in range(D):
            angle = (m - m[:, None]) * theta[c] + delta[:, c, None, None]
            lengths = functional.softplus(q[..., c])[..., None] * functional.softplus(k[..., c])[..., None, :]
            logits = logits + math.sqrt(2) * lengths * angle.cos()
        return logits
    if (basis := axes(p)) is not None:
        q, k = (torch.einsum("hrd,bhtd->bhtr", basis, u) for u in (q, k))
    cos, sin = waves(arm, one, p, x)
    z = [torch.complex(*u.chunk(2, dim=-1)) * torch.complex(cos, sin) for u in (q, k)]
    return (z[0] @ z[1].conj().mT).real


@pytest.mark.parametrize("T", [1, 700])
@pytest.mark.parametrize("arm", ARMS)
def test_logits_and_gradients_are_the_formula_s_in_float64(arm, T):
    """Also past the training length."""
    one = built(arm).encodings[0]
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, T, H * D, generator=generator)
    q, k = torch.randn(2, 2, H, T, D, generator=generator)
    upstream = torch.randn(2, H, T, T, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [u.detach().to(dtype).requires_grad_() for u in (x, q, k, *one.parameters())]
        p = dict(zip((name for name, _ in one.named_parameters()), inputs[3:], strict=True))
        if dtype == torch.float32:
            turned = torch.func.functional_call(
                Turned(one), {f"one.{name}": value for name, value in p.items()}, tuple(inputs[:3])
            )
            logits = turned[0] @ turned[1].mT
        else:
            logits = formula(arm, one, p, *inputs[:3])
        gradients = torch.autograd.grad(logits, inputs, upstream.to(dtype), allow_unused=True)
        found.append([logits, *(torch.zeros(()) if g is None else g for g in gradients)])
    for ours, wanted in zip(*found, strict=True):
        assert (ours.double() - wanted).norm() <= 2e-5 * wanted.norm() + 1e-4, (ours.shape, wanted.norm())


class Turned(torch.nn.Module):
    """An encoding's rotation of q and k as a function of its parameters."""

    def __init__(self, one: torch.nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.one.turn(q, k, self.one(x, torch.arange(x.size(1))).frame)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if " " in arm])
def test_every_arm_decodes_as_it_reads_also_past_the_training_length(arm):
    encoding, *words = arm.split()
    model, idx, cache = build(encoding, *words), tokens(128), KVCache()
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in (idx[:, :2], idx[:, 2:9], *idx[:, 9:].split(1, dim=1))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=2e-5, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_coordinates_know_nothing_of_autocast(arm):
    one = built(arm).encodings[0]
    x, pos = torch.randn(1, 600, H * D, generator=torch.Generator().manual_seed(1)), torch.arange(600)
    with torch.no_grad():
        plain = one(x, pos)
        with torch.autocast("cpu", torch.bfloat16):
            under = one(x, pos)
    assert torch.equal(plain.coords, under.coords) and plain.coords.dtype in (torch.float32, torch.float64)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain.frame, under.frame, strict=True))


IDENTITIES = [
    ("hope", ["--rope_base=10"], {}),  # every pair makes a turn in 512 tokens
    ("darope", [], {"w.weight": 0.0, "alpha": 1.0}),
    ("grape_m", [], {}),
    ("grape_m", ["--grape_planes=learned", "--grape_per_head=true"], {}),
    ("grape_m", ["--grape_log_scale=16"], {}),
    ("grape_m_ctx", ["--grape_clock_start=1"], {}),
    ("selective_rope", ["--selective_bias=true"], {"filter": 0.0}),
]


@pytest.mark.parametrize(("encoding", "words", "at"), IDENTITIES)
def test_what_is_rope_has_its_logits(encoding, words, at):
    """A frequency that is kept as a logarithm in fp32 is 1e-7 of itself away, 5e-5 radians at position 512."""
    rope, ours = moved_alike("rope", encoding, also=tuple(word for word in words if "rope_base" in word))
    if len(words) > sum("rope_base" in word for word in words):
        start = GPT(load_config([*[f"--{k}={v}" for k, v in SIZES.items()], f"--encoding={encoding}", *words])).eval()
        start.load_state_dict(rope.state_dict(), strict=False)
        ours = start
    idx = tokens(512, batch=1)
    with torch.no_grad():
        for one in ours.encodings:
            for name, value in at.items():
                one.get_parameter(name).fill_(value)
        expected = rope(idx)
        torch.testing.assert_close(ours(idx), expected, atol=2e-4, rtol=0)
        for p in ours.encodings[0].parameters():
            p.add_(0.1)
        assert encoding == "hope" or (ours(idx) - expected).abs().max() > 1e-2


SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 97, "block_size": 512}


def test_without_its_random_part_fope_is_rope_on_a_fourth_of_the_channels():
    one = build("fope", "--fope_gain=0", f"--block_size={L}").encodings[0]
    q, k = torch.randn(2, 1, H, 40, D, generator=torch.Generator().manual_seed(4)).double()
    q_after, k_after = one.turn(q.float(), k.float(), one(torch.zeros(1, 40, H * D), torch.arange(40)).frame)
    keeps = torch.arange(D) % F < D // 4
    angle = torch.arange(40)[:, None] * THETA[: D // 4]
    z = [torch.complex(u[..., : D // 4], u[..., F : F + D // 4]) * torch.exp(1j * angle) for u in (q, k)]
    wanted = (z[0] @ z[1].conj().mT).real + 2 * (q * ~keeps) @ (k * ~keeps).mT
    torch.testing.assert_close((q_after @ k_after.mT).double(), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("length", "width", "fast", "series"), [(512, 64, 16, 16), (1024, 64, 18, 16), (64, 24, 4, 4), (7, 2, 1, 1)]
)
def test_fast_pairs_make_a_turn_in_the_training_length(length, width, fast, series):
    words = [
        "--n_layer=1",
        "--n_head=2",
        f"--n_embd={2 * width}",
        "--vocab_size=97",
        f"--block_size={length}",
        "--micro_batch=1",
    ]
    one = GPT(load_config([*words, f"--tokens_per_step={length}", "--encoding=fope", "--fope_gain=0"])).encodings[0]
    assert (one.n_fast, one.n_series) == (fast, series)
    assert 10000 ** (-2 * (fast - 1) / width) * length >= 2 * math.pi > 10000 ** (-2 * fast / width) * length
    ones = one.of_cos[0].nonzero().tolist()
    assert ones == ([[2 * i, i] for i in range(9)] if length == 1024 else [[i, i] for i in range(series)])


def test_a_token_counts_on_the_clock_what_the_option_says():
    for words, start in (
        ([], 0.001),
        (["--grape_clock_start=2.5"], 2.5),
        (["--grape_clock=sigmoid", "--grape_clock_start=0.394"], 0.394),
    ):
        one = GPT(load_config(["--n_embd=32", "--n_head=2", "--n_layer=1", "--encoding=grape_m_ctx", *words])).encodings[0]
        clock = one.coords(torch.randn(1, 5, 32), torch.arange(5))
        torch.testing.assert_close(clock[0, 0, :, 0], start * torch.arange(5.0).double(), rtol=1e-5, atol=0)
    with pytest.raises(UserError, match="grape_clock_start = 1: a sigmoid's step is less than 1"):
        load_config(["--encoding=grape_m_ctx", "--grape_clock=sigmoid", "--grape_clock_start=1"])


@pytest.mark.parametrize("encoding", ["hope", "darope", "fope"])
def test_a_length_in_which_nothing_turns_is_refused(encoding):
    with pytest.raises(UserError, match=rf"block_size = 6: no pair .* {encoding!r} turns .* from 7 on one does"):
        build(encoding, "--block_size=6", "--tokens_per_step=6", "--micro_batch=1")


def test_the_series_of_fope_are_drawn_by_the_seed_kept_by_checkpoints_and_not_trained(corpus, tmp_path):
    words = [f"--{key}={value}" for key, value in SIZES.items() if key not in ("block_size", "vocab_size")]
    words += [
        f"--data={corpus}",
        f"--out_dir={tmp_path}",
        "--vocab_size=320",
        "--block_size=32",
        "--steps=4",
        "--warmup_steps=0",
    ]
    words += ["--micro_batch=4", "--tokens_per_step=256", "--eval_tokens=500", "--final_eval_tokens=500", "--device=cpu"]
    words += ["--encoding=fope", "--name=r"]
    assert (stopped := run_command("train.py", *words, "--save_every=2", "--keep_checkpoints=9")).returncode == 0, (
        stopped.stderr
    )
    start = GPT(load_config(words)).state_dict()
    other = GPT(load_config([*words, "--seed=2"])).state_dict()
    for step in (2, 4):
        model, state, _ = load_model(tmp_path / f"r/checkpoints/step_{step:06d}")
        for name, value in model.state_dict().items():
            if ".of_" in name:
                assert torch.equal(value, start[name]) and not torch.equal(value, other[name])
    log = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["loss"]) for record in log if "loss" in record) and state.step == 4
