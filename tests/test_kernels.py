"""The fused loss and the blocked attention against the same written out in float64, and the memory settings at work."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from core.attention import attention
from core.kernels import cross_entropy as loss_module
from core.kernels.cross_entropy import linear_cross_entropy
from lab.bench.trainee import chosen


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def head(n: int, n_vocab: int, width: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, width, generator=generator)
    weight = torch.randn(n_vocab, width, generator=generator) / width**0.5
    return x, weight, torch.randint(0, n_vocab, (2, n), generator=generator)


def written_out(x, weight, targets):
    """Loss and gradients in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = functional.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss, x.grad, weight.grad


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 20), n_vocab=st.integers(2, 100), width=st.integers(1, 33),
    chunk=st.integers(1, 5_000), cache=st.integers(1, 5_000),
)  # fmt: skip
def test_fused_loss_and_its_gradients_whatever_the_chunks(n, n_vocab, width, chunk, cache):
    x, weight, targets = head(n, n_vocab, width)
    before = loss_module.CHUNK_BYTES, loss_module.CACHE_BYTES
    loss_module.CHUNK_BYTES, loss_module.CACHE_BYTES = {"cpu": chunk}, {"cpu": cache}
    try:
        x.requires_grad_(), weight.requires_grad_()
        loss = linear_cross_entropy(x, weight, targets)
        (3 * loss).backward()
    finally:
        loss_module.CHUNK_BYTES, loss_module.CACHE_BYTES = before
    wanted, dx, dw = written_out(x, weight, targets)
    torch.testing.assert_close(loss.double(), wanted.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.grad.double() / 3, dx, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weight.grad.double() / 3, dw, atol=1e-6, rtol=1e-4)


def test_fused_loss_in_bf16_is_as_good_as_written_out_under_autocast():
    x, weight, targets = head(300, 5000, 64)
    wanted, *grads = written_out(x, weight, targets)

    def errors(loss_of) -> list[float]:
        u, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(u, w)
        loss.backward()
        return [abs(loss.item() - wanted.item()), error(u.grad, grads[0]), error(w.grad, grads[1])]

    plain = errors(lambda u, w: functional.cross_entropy(functional.linear(u, w).flatten(0, 1).float(), targets.flatten()))
    fused = errors(lambda u, w: linear_cross_entropy(u, w, targets))
    assert all(f < 1.2 * p + 1e-5 for f, p in zip(fused, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_that_is_compiled_is_the_same(dtype, monkeypatch):
    """A compiler gets a formula that it can make one kernel of. In several chunks, an unlikely target among them."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 50_000})
    x, weight, targets = head(40, 300, 16)
    x[0, 0] *= 300
    wanted, *grads = written_out(x.to(dtype), weight.to(dtype), targets)
    loss_of = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    u, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_of(u, w, targets)
    loss.backward()
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    assert loss.item() == pytest.approx(wanted.item(), rel=limit)
    assert error(u.grad, grads[0]) < limit and error(w.grad, grads[1]) < limit


def test_loss_per_token_has_gradients_too():
    x, weight, targets = head(7, 50, 8)
    x.requires_grad_()
    per_token = linear_cross_entropy(x, weight, targets, reduction="none")
    assert per_token.shape == targets.shape
    torch.testing.assert_close(per_token.mean(), linear_cross_entropy(x, weight, targets))
    (per_token * torch.arange(14).view(2, 7)).sum().backward()
    wanted = x.detach().double().requires_grad_()
    logits = (wanted @ weight.double().T).flatten(0, 1)
    (functional.cross_entropy(logits, targets.flatten(), reduction="none") * torch.arange(14)).sum().backward()
    torch.testing.assert_close(x.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, reduction="none"), per_token.detach())


def test_an_unlikely_target_has_a_finite_loss():
    x, weight = torch.ones(1, 1, 1), torch.tensor([[300.0], [-300.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([[1]])).item() == pytest.approx(600)


def test_logits_are_never_in_memory_whole():
    """The largest tensors that the loss allocates: one chunk of logits, and the gradient of the weights."""
    x, weight, targets = head(1024, 20_000, 16)
    x.requires_grad_(), weight.requires_grad_()
    limit, loss_module.CHUNK_BYTES = loss_module.CHUNK_BYTES, {"cpu": 4 << 20}
    try:
        with torch.profiler.profile(profile_memory=True) as seen:
            linear_cross_entropy(x, weight, targets).backward()
    finally:
        loss_module.CHUNK_BYTES = limit
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert largest < 16 << 20 < x.numel() // 16 * 20_000 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("T", "D"), [(512, 64), (300, 48), (257, 16), (256, 6)])
def test_blocked_attention_is_as_exact_as_torch_s(T, D, dtype):
    generator = torch.Generator().manual_seed(5)
    qkv = [3 * torch.randn(2, 3, T, D, generator=generator).to(dtype) for _ in range(3)]
    dy = torch.randn(2, 3, T, D, generator=generator).to(dtype)

    def errors(attend, wanted=None, dtype=dtype) -> list:
        inputs = [u.to(dtype).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for u in qkv]
        y = attend(*inputs)
        y.backward(dy.to(dtype))
        found = [y.detach(), *(u.grad for u in inputs)]
        return found if wanted is None else [error(f, w) for f, w in zip(found, wanted, strict=True)]

    def torch_s(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    wanted = errors(torch_s, dtype=torch.float64)
    ours, theirs = errors(lambda q, k, v: attention(q, k, v, None), wanted), errors(torch_s, wanted)
    assert all(o < 2 * t for o, t in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize(
    ("T", "dtype"), [(1, "float32"), (40, "bfloat16"), (300, "float32"), (300, "bfloat16"), (900, "float32")]
)
def test_values_may_be_narrower_than_keys(T, dtype):
    """In blocks, by torch's own, and of one token to the keys of a cache; values and gradients."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, D, generator=generator) for n, D in ((T, 32), (max(T, 7), 32), (max(T, 7), 16)))
    q, k, v = (u.to(getattr(torch, dtype)).requires_grad_(T > 1) for u in (q, k, v))
    exact = [u.detach().double().requires_grad_(T > 1) for u in (q, k, v)]
    y = attention(q, k, v, None)
    logits = exact[0] @ exact[1].mT / 32**0.5
    wanted = logits.masked_fill(torch.ones(logits.shape[-2:]).tril(logits.size(-1) - T) == 0, -torch.inf).softmax(-1) @ exact[2]
    close = 1e-5 if dtype == "float32" else 0.02
    assert y.shape == wanted.shape and error(y, wanted) < close
    if T > 1:
        upstream = torch.randn(y.shape, generator=generator)
        ours = torch.autograd.grad(y, (q, k, v), upstream.to(y.dtype))
        theirs = torch.autograd.grad(wanted, exact, upstream.double())
        assert all(error(mine, true) < close for mine, true in zip(ours, theirs, strict=True))


def test_blocked_attention_is_what_runs_and_is_causal():
    q, k, v = (torch.randn(1, 1, 200, 8).bfloat16().requires_grad_() for _ in range(3))
    y = attention(q, k, v, None)
    assert type(y.grad_fn).__name__ == "_BlockedAttentionBackward" and chosen(q) == "blocked" != chosen(q.float())
    y[:, :, 150].sum().backward()
    for u in (k, v):
        assert u.grad[:, :, 151:].abs().max() == 0 < u.grad[:, :, :151].abs().max()
    assert type(attention(q, k, v, torch.zeros(200, 200)).grad_fn).__name__ != "_BlockedAttentionBackward"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_a_step_takes_no_new_memory_from_the_kernel():
    """What is freed is kept: after the first rounds tensors of 64 MB cause hardly a page fault; else 16384 each."""
    code = """
import resource, sys
if sys.argv[1] == "host":
    import core.host
import torch
for _ in range(3):
    a = torch.ones(16 << 20); b = a * 2; del a, b
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    a = torch.ones(16 << 20); b = a * 2; del a, b
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = {key: value for key, value in os.environ.items() if key not in ("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES")}
    env = {key: value for key, value in env.items() if not key.startswith("MALLOC_")}
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, env=env, capture_output=True, text=True).stdout)
        for how in ("host", "plain")
    }
    assert faults["plain"] > 16384 and faults["host"] < faults["plain"] / 20


@pytest.mark.parametrize("script", ["train.py", "eval_ppl.py", "sample.py", "table1.py", "lab/bench/__main__.py"])
def test_commands_set_the_memory_before_torch_comes(script):
    text = (ROOT / script).read_text()
    assert -1 < text.find("\nimport core.host") < text.find("import torch") % len(text)
