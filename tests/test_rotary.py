"""Encodings that turn queries and keys, each against its formula written out."""

import numpy as np
import pytest
import torch
from test_positional import build, tokens

from config import load_config
from model import GPT
from positional import ENCODINGS

CAROPE = sorted(name for name in ENCODINGS if name.startswith("carope"))


def moved_alike(*encodings: str, block_size: int = 512) -> list[GPT]:
    """Models of these encodings, each at its start; the rest of their weights is the same, away from its start."""
    words = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--vocab_size=97", f"--block_size={block_size}"]
    models = [GPT(load_config([*words, f"--encoding={encoding}"])).eval() for encoding in encodings]
    with torch.no_grad():
        for model in models:
            generator = torch.Generator().manual_seed(5)
            for name, p in model.named_parameters():
                if "wpe" not in name:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return models


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
