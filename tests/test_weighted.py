"""CoPE, URPE and PaTH against their formulas, position by position in float64 NumPy."""

import json

import numpy as np
import pytest
import torch
from test_export import saved
from test_positional import build

from core.checkpoint import load_model, sealed
from core.config import Config
from core.errors import UserError
from core.run import check_same
from positional.path import transformed_logits

D = 16  # of `build`'s two heads
N = 9


def visible(T: int, S: int) -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def queries_and_keys(S: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, 1, 2, S, D, generator=torch.Generator().manual_seed(4))
    return q[:, :, S - T :], k


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def as_numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.detach().double().numpy() for t in tensors]


@pytest.mark.parametrize(("T", "divide"), [(N, True), (3, True), (N, False)])
def test_cope_equals_the_formula_in_numpy(T, divide):
    """With fewer positions than the gates add up to: the clamp is at work."""
    cope = build("cope", "--cope_max=4", f"--cope_divide={divide}").encodings[1]
    q, k = queries_and_keys(N, T)
    ours = cope.weights(q, k, None, None, visible(T, N))[0].detach().numpy()
    q, k, e = as_numpy(q[0], k[0], cope.e)
    clamped = 0
    for h in range(2):
        for t in range(T):
            i = N - T + t
            gates = sigmoid(k[h, : i + 1] @ q[h, t] / np.sqrt(D))
            logits = k[h, : i + 1] @ q[h, t] / np.sqrt(D)
            for j in range(i + 1):
                p = min(gates[j:].sum(), 3.0)
                clamped += p == 3
                low, high = int(np.floor(p)), int(np.ceil(p))
                part = p - low
                logits[j] += q[h, t] @ ((1 - part) * e[low] + part * e[high]) / (np.sqrt(D) if divide else 1)
            np.testing.assert_allclose(ours[h, t, : i + 1], softmax(logits), atol=1e-6)
            assert (ours[h, t, i + 1 :] == 0).all()
    assert clamped


@pytest.mark.parametrize(("encoding", "option"), [("cope", "cope_divide"), ("path", "path_silu")])
def test_a_checkpoint_from_before_an_option_stays_what_it_was(tmp_path, encoding, option):
    """It computes as it did, and is continued only by a command that asks for the same."""
    saved(tmp_path / "run", encoding)
    (path,) = tmp_path.glob("run/checkpoints/*/state.json")
    state = json.loads(path.read_text())
    assert load_model(tmp_path / "run")[1].config[option] is True
    del state["config"][option]
    path.write_text(sealed(state))
    _, old, _ = load_model(tmp_path / "run")
    assert old.config[option] is False
    with pytest.raises(UserError, match=rf"{option} = False \(now True\)"):
        check_same(old, Config(**state["config"]), {})


def test_the_gates_of_cope_learn_through_its_positions():
    cope = build("cope").encodings[0]
    q, k = queries_and_keys(N, N)
    direction = torch.randn(k.shape, generator=torch.Generator().manual_seed(5))

    def first_key(k: torch.Tensor) -> torch.Tensor:
        return cope.weights(q, k, None, None, visible(N, N))[..., 0].sum()

    k.requires_grad_()
    (grad,) = torch.autograd.grad(first_key(k), k)
    with torch.no_grad():  # what a key does to the positions of earlier ones is in the difference, and so in the gradient
        slope = (first_key(k + 1e-3 * direction) - first_key(k - 1e-3 * direction)) / 2e-3
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.01)


@pytest.mark.parametrize("T", [12, 5])
def test_urpe_multiplies_by_a_factor_of_the_distance_clamped_to_the_table(T):
    (urpe,) = build("urpe").encodings  # one for all layers
    urpe.c = torch.nn.Parameter(urpe.c[:, :8].detach())  # as of block_size = 8, fewer than the 12 keys
    q, k = queries_and_keys(12, T)
    ours = urpe.weights(q, k, None, None, visible(T, 12))[0].detach().numpy()
    q, k, c = as_numpy(q[0], k[0], urpe.c)
    for h in range(2):
        for t in range(T):
            i = 12 - T + t
            factor = np.array([1 + c[h, min(i - j, 7)] for j in range(i + 1)])
            np.testing.assert_allclose(ours[h, t, : i + 1], softmax(k[h, : i + 1] @ q[h, t] / 4) * factor, atol=1e-6)
            assert (ours[h, t, i + 1 :] == 0).all()


def test_urpe_starts_as_nope():
    from core.config import load_config
    from model import GPT

    words = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=97", "--block_size=32"]
    idx = torch.arange(40)[None]
    urpe, nope = (GPT(load_config([*words, f"--encoding={name}"]))(idx) for name in ("urpe", "nope"))
    torch.testing.assert_close(urpe, nope, atol=1e-6, rtol=0)


def path_from_hidden(path, h_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w (H, T, D) and β (H, T) as the text of the paper has them."""
    down, up, taps, W, b = as_numpy(path.down.weight, path.up.weight, path.filter, path.beta.weight, path.beta.bias)
    u = h_TC @ down.T @ up.T
    w = np.zeros_like(u)
    for t in range(len(u)):
        for back in range(3):
            if t >= back:
                w[t] += taps[:, 2 - back] * u[t - back]
    w = w * sigmoid(w) if path.silu else w
    w = w.reshape(len(u), 2, D).transpose(1, 0, 2)
    return w / np.sqrt((w**2).sum(-1, keepdims=True)), 2 * sigmoid(h_TC @ W.T + b).T


@pytest.mark.parametrize(("T", "silu"), [(N, True), (3, True), (N, False)])
def test_path_equals_the_product_of_its_matrices_in_numpy(T, silu):
    path = build("path", "--path_rank=6", f"--path_silu={silu}").encodings[0]
    h = torch.randn(1, N, 32, generator=torch.Generator().manual_seed(8))
    q, k = queries_and_keys(N, T)
    coords = path.coords(h, torch.arange(N))
    ours = path.weights(q, k, coords[:, :, N - T :], coords, visible(T, N))[0].detach().numpy()
    w, beta = path_from_hidden(path, h[0].double().numpy())
    q, k = as_numpy(q[0], k[0])
    for head in range(2):
        H = [np.eye(D) - beta[head, s] * np.outer(w[head, s], w[head, s]) for s in range(N)]
        for t in range(T):
            i = N - T + t
            logits = np.zeros(i + 1)
            for j in range(i + 1):
                product = np.eye(D)
                for s in range(j + 1, i + 1):
                    product = product @ H[s]
                logits[j] = k[head, j] @ product @ q[head, t] / np.sqrt(D)
            np.testing.assert_allclose(ours[head, t, : i + 1], softmax(logits), atol=1e-6)
            assert (ours[head, t, i + 1 :] == 0).all()


def test_path_stays_exact_at_the_training_length_where_tokens_reflect_along_nearly_the_same_line():
    S = 512
    rng = np.random.default_rng(0)
    w = rng.normal(size=D) + 0.1 * rng.normal(size=(S, D))
    w /= np.sqrt((w**2).sum(-1, keepdims=True))
    q, k, beta = rng.normal(size=(S, D)), rng.normal(size=(S, D)), rng.uniform(0.01, 1.99, size=S)
    given = [torch.from_numpy(a).float()[None, None] for a in (q, k, w, beta)]
    ours = transformed_logits(*given, visible(S, S))[0, 0].numpy()
    moved = np.zeros_like(k)  # the keys so far, reflected by all that came after them
    for i in range(S):
        moved -= beta[i] * np.outer(moved @ w[i], w[i])
        moved[i] = k[i]
        np.testing.assert_allclose(ours[i, : i + 1], moved[: i + 1] @ q[i], atol=2e-4)


def test_paths_coordinates_go_on_from_the_last_and_know_nothing_of_autocast():
    path = build("path").encodings[0]
    h = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        whole = path.coords(h, torch.arange(N))
        first = path.coords(h[:, :1], torch.arange(1), torch.zeros(1, 1, 1, 1, dtype=torch.float64))
        second = path.coords(h[:, 1:6], torch.arange(1, 6), first[..., -1:, :])
        third = path.coords(h[:, 6:], torch.arange(6, N), second[..., -1:, :])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(path.coords(h, torch.arange(N)), whole)
    torch.testing.assert_close(torch.cat((first, second, third), dim=-2), whole, atol=1e-5, rtol=0)
