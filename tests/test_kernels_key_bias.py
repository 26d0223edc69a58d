"""The kernels for the gradient of a bias by keys, interpreted or on a GPU compiled, against autograd in float64."""

import sys

import pytest
import torch
from conftest import sizes_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from core.kernels.key_bias import in_blocks, key_bias_gradient
from core.kernels.support import key_bias_kernel

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")


def reference(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    """dL/dc by autograd through the whole matrix of logits, all in float64."""
    q, k, v, dy, c = (u.double() for u in (q, k, v, dy, c))
    c.requires_grad_()
    logits = q @ k.mT / q.size(3) ** 0.5 + c[..., None, :] - c[..., :, None]
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    y = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return torch.autograd.grad(y, c, dy)[0]


def inputs(B: int, H: int, T: int, D: int, dtype: torch.dtype, step: float, seed: int = 0) -> list[Tensor]:
    """q, k, v, dy, laid out as (B, T, H, D), and a running sum of numbers up to `step`."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(B, T, H, D, generator=generator).to(DEVICE, dtype).transpose(1, 2) for _ in range(4)]
    return [*found, (step * torch.rand(B, H, T, generator=generator, dtype=torch.float64)).cumsum(-1).to(DEVICE)]


def compare(gradient, step: float, *given: Tensor) -> None:
    """As close as fp32 comes, to c and to what c sums up; logits span what c does in a block of 128 queries."""
    limit = 2e-5 + 128 * step * 2**-24
    found, wanted = gradient(*given).double(), reference(*given)
    for mine, exact in ((found, wanted), (found.flip(-1).cumsum(-1), wanted.flip(-1).cumsum(-1))):
        assert (mine - exact).norm() <= limit * (exact.norm() + 1)


@settings(deadline=None, max_examples=12)
@given(
    B=st.sampled_from([1, 2]), H=st.sampled_from([1, 3]), T=st.sampled_from([1, 2, 63, 64, 65, 150]),
    D=st.sampled_from([2, 16, 24, 64]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    step=st.sampled_from([0.05, 1.4, 30.0]),
)  # fmt: skip
def test_the_kernels_have_the_gradient_of_the_formula(B, H, T, D, dtype, step):
    assert key_bias_kernel(DEVICE) is not None
    compare(key_bias_gradient, step, *inputs(B, H, T, D, dtype, step))


@pytest.mark.parametrize("T", [1, 127, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_has_what_stands_in_for_them(T, dtype):
    compare(in_blocks, 1.4, *inputs(2, 2, T, 16, dtype, 1.4))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.kernels import key_bias_tiles as tiles

fixed = {"D": 64, "BLOCK_D": 64, "BLOCK": tiles.BLOCK}
types = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "dy_ptr")} | {"c_ptr": "*fp64", "scale": "fp32"}
for kernel in (tiles.rows_kernel, tiles.columns_kernel):
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(kernel, signature, {n: v for n, v in fixed.items() if n in names})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.WARPS}).asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_the_kernels_compile_for_an_h100_on_any_machine(tmp_path):
    assert [size > 1000 for size in sizes_compiled(COMPILE, tmp_path)] == [True] * 2
