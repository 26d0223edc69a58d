"""The loss's kernel against float64: compiled on a GPU where there is one, else under Triton's interpreter."""

import sys

import pytest
import torch
from conftest import sizes_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

HAS_CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from core.kernels import cross_entropy_tiles as tiles
from core.kernels.cross_entropy import linear_cross_entropy
from core.kernels.support import cross_entropy_kernel

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")


def written_out(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of each row in float64."""
    exact_NV = logits_NV.double().requires_grad_()
    loss_N = functional.cross_entropy(exact_NV, targets_N, reduction="none")
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), exact_NV)[0]


@settings(deadline=None, max_examples=15)
@given(
    N=st.integers(1, 4), V=st.sampled_from([2, 63, 64, 65, 320, 1000]), scale=st.sampled_from([1.0, 30.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_losses_and_gradients_are_those_of_float64(N, V, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(N, V + 3, generator=generator)).to(DEVICE, dtype)[:, :V]  # rows lie apart
    targets = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    loss, grad = written_out(logits, targets)
    block, tiles.BLOCK = tiles.BLOCK, 64
    try:
        found = tiles.loss_and_grad_(logits, targets)
    finally:
        tiles.BLOCK = block
    torch.testing.assert_close(found.double(), loss, atol=2e-6 * scale, rtol=1e-6)
    limit = {"atol": 2**-8, "rtol": 2**-7} if dtype == torch.bfloat16 else {"atol": 1e-6 * scale, "rtol": 1e-5}
    torch.testing.assert_close(logits.double(), grad, **limit)


def test_words_that_cannot_come_change_nothing():
    logits = torch.tensor([[-torch.inf] * 70 + [1.0, 2.0]], device=DEVICE)
    targets = torch.tensor([71], device=DEVICE)
    loss, grad = written_out(logits, targets)
    torch.testing.assert_close(tiles.loss_and_grad_(logits, targets).double(), loss)
    torch.testing.assert_close(logits.double(), grad, atol=1e-6, rtol=0)


def test_the_loss_has_it_on_a_gpu_alone():
    assert cross_entropy_kernel(torch.device("cuda")) is tiles.loss_and_grad_
    assert cross_entropy_kernel(torch.device("cpu")) is None


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device: the compiled kernel at full size")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_gpt2_s_vocabulary(compiled):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 256, 64, generator=generator).to(DEVICE).requires_grad_()
    weight = (torch.randn(50304, 64, generator=generator) / 8).to(DEVICE).requires_grad_()
    targets = torch.randint(0, 50257, (4, 256), generator=generator).to(DEVICE)
    loss_of = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else linear_cross_entropy
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(x, weight, targets)
    grads = torch.autograd.grad(loss, (x, weight))
    exact = [u.detach().double().requires_grad_() for u in (x, weight)]
    wanted = functional.cross_entropy((exact[0] @ exact[1].T).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for found, right in zip(grads, torch.autograd.grad(wanted, exact), strict=True):
        assert ((found - right).norm() / right.norm()).item() < 1e-2


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.kernels import cross_entropy_tiles as tiles

types = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32", "BLOCK": "constexpr"}
signature = {"V": "i32", "stride": "i32"} | types
source = ASTSource(tiles.loss_and_grad_kernel, signature, {"BLOCK": tiles.BLOCK})
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.WARPS}).asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_the_kernel_compiles_for_an_h100_on_any_machine(tmp_path):
    assert [size > 1000 for size in sizes_compiled(COMPILE, tmp_path)] == [True]
