"""SeqPE: the digits, the encoder in float64 NumPy, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from test_positional import build, tokens

from core.config import load_config
from core.errors import UserError


@pytest.mark.parametrize(("base", "digits"), [(10, 5), (2, 12), (16, 3)])
def test_positions_are_written_in_digits(base, digits):
    seqpe = build("seqpe", f"--seqpe_base={base}", f"--seqpe_digits={digits}").wpe
    pos = torch.tensor([0, 1, 9, 10, 31, 512, 1023, 4095])
    for position, symbols in zip(pos.tolist(), seqpe.symbols(pos).tolist(), strict=True):
        assert symbols == [int(d, 36) for d in np.base_repr(position, base).zfill(digits)] + [base]


def encode(seqpe, symbols: list[int]) -> np.ndarray:
    """The embedding of one numeral: two causal pre-norm layers over its symbols, then the last one's output."""
    p = {name: value.detach().double().numpy() for name, value in seqpe.named_parameters()}

    def norm(u, name):
        return (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[
            f"{name}.bias"
        ]

    u = p["symbol"][symbols] + p["place"]
    for layer in ("layers.0", "layers.1"):
        q, k, v = np.split(norm(u, f"{layer}.norm_1") @ p[f"{layer}.qkv.weight"].T, 3, axis=-1)
        mixed, D = np.zeros_like(q), q.shape[-1] // 4
        for head in range(4):
            of = slice(head * D, (head + 1) * D)
            for i in range(len(u)):
                weight = np.exp(k[: i + 1, of] @ q[i, of] / math.sqrt(D))
                mixed[i, of] = weight / weight.sum() @ v[: i + 1, of]
        u = u + mixed @ p[f"{layer}.mix.weight"].T
        wide = norm(u, f"{layer}.norm_2") @ p[f"{layer}.wide.weight"].T
        u = u + wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) / 2 @ p[f"{layer}.narrow.weight"].T
    return norm(u[-1], "norm") @ p["out.weight"].T


def test_the_encoder_equals_its_formula_in_numpy():
    seqpe = build("seqpe", "--seqpe_width=16", "--seqpe_digits=3", spread=0.2).wpe
    with torch.no_grad():
        ours = seqpe.embed(torch.ones(2, 4, 32), torch.tensor([0, 7, 42, 999])) - 1
    assert torch.equal(ours[0], ours[1])
    for embedding, symbols in zip(ours[0].numpy(), ([0, 0, 0, 10], [0, 0, 7, 10], [0, 4, 2, 10], [9, 9, 9, 10]), strict=True):
        np.testing.assert_allclose(embedding, encode(seqpe, symbols), atol=1e-4)


def test_positions_start_as_large_as_a_learned_table_and_apart():
    from model import GPT

    model = GPT(load_config(["--n_layer=1", "--n_head=2", "--n_embd=64", "--vocab_size=97", "--encoding=seqpe"]))
    with torch.no_grad():
        table = model.wpe.embed(torch.zeros(1, 512, 64), torch.arange(512))[0]
    assert table.std().item() == pytest.approx(0.02, rel=0.3)
    apart = torch.cdist(table, table).fill_diagonal_(math.inf).min()
    assert apart > 0.05 * table.norm(dim=-1).mean()


def test_numerals_end_where_their_digits_end():
    model = build("seqpe", "--seqpe_digits=2")
    with torch.no_grad():
        assert model(tokens(100)).isfinite().all()
    with pytest.raises(ValueError, match=r"101 tokens.*seqpe.*100 only"):
        model(tokens(101))


def test_too_few_digits_for_the_training_length_are_refused():
    with pytest.raises(UserError, match=r"seqpe_digits = 2: to the base 10.*100 positions.*block_size = 512; 3 digits do"):
        load_config(["--encoding=seqpe", "--seqpe_digits=2"])


def test_the_encoder_learns_a_random_table_at_a_learning_rate_of_6e_4():
    seqpe = build("seqpe", spread=0).wpe
    with torch.no_grad():
        seqpe.init_weights()
    pos, x = torch.arange(16), torch.zeros(1, 16, 32)
    table = 0.02 * torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(seqpe.parameters(), lr=6e-4)
    for _ in range(50):
        error = (seqpe.embed(x, pos)[0] - table).square().mean() / table.square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.3  # of 1
