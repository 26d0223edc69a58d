"""The rotation kernels against formulas in float64: compiled on a GPU where there is one, else under Triton's interpreter.

What CUDA alone can show (the compiled kernels' numbers) is skipped without it, but that they compile for an H100 is not.
"""

import math
import sys

import pytest
import torch
from conftest import run_command, sizes_compiled
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from core.config import load_config
from core.errors import UserError
from core.kernels.rotary import Rotation
from core.kernels.support import check_kernel, rotation_kernel
from model import GPT, KVCache
from positional import ENCODINGS, RoPE

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
TURNING = ["rope", "carope", "carope_hidden", "carope_nobias"]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device: compares the compiled kernels at full size")


def reference(qkv_3BHTD: Tensor, f: Tensor, inclusive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned by the running sums of powers of f, and v, in the type of the arguments."""
    powers = f[..., None] ** torch.arange(qkv_3BHTD.size(-1) // 2, device=f.device)
    phase = powers.cumsum(-2) if inclusive else powers.cumsum(-2) - powers
    q, k, v = qkv_3BHTD
    halves = [u.chunk(2, dim=-1) for u in (q, k)]
    q, k = (torch.cat((a * phase.cos() - b * phase.sin(), b * phase.cos() + a * phase.sin()), dim=-1) for a, b in halves)
    return q, k, v


def random_qkv(B: int, H: int, T: int, D: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """q, k, v as the model makes them: one view of what c_attn gives, (B, T, 3C)."""
    packed = torch.randn(B, T, 3 * H * D, generator=generator).to(DEVICE, dtype)
    return packed.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)


def compare(qkv: Tensor, f: Tensor, inclusive: bool, generator: torch.Generator) -> None:
    """Outputs and gradients of the kernels against autograd through `reference` in float64."""
    qkv, f = qkv.detach().requires_grad_(), f.detach().requires_grad_()
    qkv_64, f_64 = (u.detach().double().requires_grad_() for u in (qkv, f))
    ours, exact = Rotation(f, qkv.size(-1) // 2, inclusive)(qkv), reference(qkv_64, f_64, inclusive)
    grads = [torch.randn(u.shape, generator=generator).to(DEVICE, u.dtype) for u in ours]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)  # attention gives gradients in strides of its own
    grad_qkv, grad_f = torch.autograd.grad(ours, (qkv, f), grads)
    exact_qkv, exact_f = torch.autograd.grad(exact, (qkv_64, f_64), [g.double() for g in grads])
    # bf16 keeps 8 bits, and the interpreter cuts where a GPU rounds
    near = {"atol": 1e-6, "rtol": 2**-7} if qkv.dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 0}
    for one, other in [*zip(ours, exact, strict=True), (grad_qkv, exact_qkv)]:
        assert one.dtype == qkv.dtype
        torch.testing.assert_close(one.double(), other, **near)
    assert torch.equal(ours[2], qkv[2])
    assert grad_f.dtype == f.dtype and grad_f.shape == f.shape
    scale = exact_f.abs().max().item() or 1.0
    torch.testing.assert_close(grad_f.double() / scale, exact_f / scale, atol=2e-6, rtol=0)


def test_the_reference_has_the_gradients_it_claims():
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(3, 1, 2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    f = torch.rand(1, 2, 5, generator=generator, dtype=torch.float64).requires_grad_()
    for inclusive in (True, False):
        assert torch.autograd.gradcheck(lambda u, v, inclusive=inclusive: reference(u, v, inclusive), (qkv, f))


slow = pytest.mark.slow
FLOAT, BF16 = torch.float32, torch.bfloat16
CASES = [  # B, H, T, D; whether f is per sequence, per head
    pytest.param(2, 3, 70, 64, True, True, FLOAT),
    pytest.param(1, 2, 64, 32, True, True, BF16),
    pytest.param(2, 2, 129, 32, False, True, FLOAT),
    pytest.param(2, 1, 33, 48, True, False, BF16),
    pytest.param(2, 1, 1, 64, True, True, FLOAT),
    pytest.param(1, 1, 260, 2, True, True, FLOAT),
    pytest.param(2, 3, 70, 64, True, True, BF16, marks=slow),
    pytest.param(1, 2, 64, 32, True, True, FLOAT, marks=slow),
    pytest.param(1, 1, 100, 128, False, False, FLOAT, marks=slow),
    pytest.param(1, 2, 100, 128, True, True, BF16, marks=slow),
    pytest.param(1, 2, 37, 80, True, True, FLOAT, marks=slow),
    pytest.param(1, 2, 300, 96, True, True, BF16, marks=slow),
]


@pytest.mark.parametrize(("B", "H", "T", "D", "per_sequence", "per_head", "dtype"), CASES)
def test_values_and_gradients_are_those_of_float64(B, H, T, D, per_sequence, per_head, dtype):
    generator = torch.Generator().manual_seed(T)
    f = torch.rand(B if per_sequence else 1, T, H if per_head else 1, generator=generator).transpose(1, 2).to(DEVICE)
    compare(random_qkv(B, H, T, D, dtype, generator), f, inclusive=T % 2 == 0, generator=generator)


def test_strides_of_any_kind_and_f_in_float64():
    generator = torch.Generator().manual_seed(8)
    qkv = torch.randn(2, 64, 40, 3, 2, generator=generator).to(DEVICE).permute(3, 0, 4, 2, 1)  # channels far apart
    f = torch.rand(2, 80, 2, generator=generator, dtype=torch.float64).to(DEVICE)[:, ::2].transpose(1, 2)
    compare(qkv, f, inclusive=False, generator=generator)


@pytest.mark.parametrize("least", [1e-30, pytest.param(1e-38, marks=slow), 1 - 2**-24])
def test_f_next_to_nothing_and_next_to_one(least):
    generator = torch.Generator().manual_seed(9)
    f = torch.full((1, 1, 150), least)
    f[..., ::3] = torch.rand(50, generator=generator)
    compare(random_qkv(1, 1, 150, 64, torch.float32, generator), f.to(DEVICE), inclusive=True, generator=generator)


@pytest.mark.parametrize("T", [4096, pytest.param(16_384, marks=slow)])
def test_long_phases_are_better_than_those_of_a_running_sum_in_fp32(T):
    generator = torch.Generator().manual_seed(T)
    f = (0.6 + 0.39 * torch.rand(1, 1, T, generator=generator)).to(DEVICE)
    qkv = torch.zeros(3, 1, 1, T, 32, device=DEVICE)
    qkv[..., :16] = 1  # a rotated pair is cosine and sine of its phase
    exact = reference(qkv.double(), f.double(), inclusive=True)[0]
    errors = [(one[0] - exact).abs().max().item() for one in (Rotation(f, 16, True)(qkv), reference(qkv, f, inclusive=True))]
    assert errors[0] < 2e-6
    assert errors[0] < errors[1] / 10


def build(encoding: str, kernel: str, *words: str) -> GPT:
    """A small model away from its start."""
    sizes = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--vocab_size=97"]
    model = GPT(load_config([*sizes, f"--encoding={encoding}", f"--kernel={kernel}", *words]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(DEVICE)


def tokens(n: int) -> Tensor:
    return torch.randint(0, 97, (2, n), generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.mark.parametrize("encoding", [*TURNING[:3], pytest.param(TURNING[3], marks=slow)])
def test_the_model_computes_the_same_with_the_kernel(encoding):
    idx, found = tokens(140), {}  # two blocks
    for kernel in ("eager", "triton"):
        model = build(encoding, kernel)
        assert [one.kernel for one in model.encodings] == [Rotation if kernel == "triton" else None] * len(model.encodings)
        loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        found[kernel] = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    for name, value in found["eager"].items():
        torch.testing.assert_close(found["triton"][name], value, atol=3e-5 * value.abs().max().item(), rtol=0, msg=name)


@pytest.mark.slow
def test_the_compiled_rotation_is_one_graph_with_the_same_values_and_strides():
    """As autograd leaves it to a back-end: with shapes and strides that the operators only claim to have."""
    packed, f = torch.randn(2, 20, 3, 2, 16, device=DEVICE), torch.rand(2, 2, 20, device=DEVICE)

    def attend(packed: Tensor, f: Tensor) -> Tensor:
        q, k, v = Rotation(f, 8, True)(packed.permute(2, 0, 3, 1, 4))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    found = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)):
        inputs = packed.clone().requires_grad_(), f.clone().requires_grad_()
        found += [torch.autograd.grad(function(*inputs), inputs)]
    assert found[1][0].is_contiguous()  # the layout the matmul behind it wants
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["rope", "carope", "carope_hidden"])
def test_the_compiled_model_computes_the_same(encoding):
    model, idx, found = build(encoding, "triton"), tokens(70), []
    for net in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        net(idx, idx.roll(-1, 1)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * one.abs().max().item(), rtol=1e-4)


def test_autocast_gives_bf16_rotations_and_decoding_stays_eager():
    model, idx = build("carope", "triton", "--n_layer=1").eval(), tokens(20)
    with torch.no_grad():
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            half = model(idx)
        full, cache = model(idx), KVCache()
        pieces = [model(idx[:, :12], cache=cache)] + [model(idx[:, i : i + 1], cache=cache) for i in range(12, 20)]
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=0)


class HalfRoPE(RoPE):
    """RoPE at half the speed, which says so in its coordinates alone."""

    def coords(self, x_BTC, pos_T, last=None):
        return super().coords(x_BTC, pos_T, last) / 2


def test_a_kernel_is_given_to_those_alone_whose_frequency_says_it_all(monkeypatch):
    def given(kernel: str) -> list[str]:
        models = {name: build(name, kernel) for name in ENCODINGS}
        return [name for name, model in models.items() if all(getattr(one, "kernel", None) for one in model.encodings)]

    assert given("triton") == ["rope", *(name for name in ENCODINGS if name.startswith("carope"))]
    assert given("eager") == []
    monkeypatch.setitem(ENCODINGS, "half_rope", HalfRoPE)
    assert [one.kernel for one in build("half_rope", "triton").encodings] == [None]


def test_auto_is_the_kernel_where_there_is_a_cuda_device(monkeypatch):
    """Not under the interpreter, which would take hundreds of times as long for whoever did not ask for it."""
    for has_cuda, interprets, wanted in ((True, False, Rotation), (True, True, None), (False, False, None)):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=has_cuda: found)
        monkeypatch.setattr("core.kernels.support.interpreted", lambda found=interprets: found)
        assert rotation_kernel("auto") is wanted and rotation_kernel("eager") is None


def test_refusals_are_one_line_before_anything_starts(small, tmp_path):
    done = run_command("train.py", *small, "--kernel=triton", "--name=refused", env={"TRITON_INTERPRET": "0"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "kernel = 'triton'" in done.stderr and "--kernel=auto" in done.stderr
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match=r"kernel = 'trito' \(command line\): input should be 'auto', 'triton' or 'eager'"):
        load_config(["--kernel=trito"])


def test_without_triton_training_is_refused_and_evaluation_goes_on(monkeypatch):
    monkeypatch.setattr("core.kernels.support.INSTALLED", False)
    check_kernel("auto", DEVICE)
    with pytest.raises(UserError, match=r"Triton is not installed \(pip install triton"):
        check_kernel("triton", DEVICE)
    assert math.isfinite(build("carope", "triton")(tokens(8), tokens(8)).item())


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.kernels import rotary, rotary_tiles

for kernel in (getattr(rotary_tiles, name) for name in vars(rotary_tiles) if name.endswith("_kernel")):
    fixed = rotary._sizes(int(sys.argv[1])) | {"INCLUSIVE": True, "NEEDS_F": True, "N": 8, "BLOCK_N": 16}
    types = {"f_ptr": "*fp32", "start_ptr": "*i32", "sums_ptr": "*fp64", "inside_ptr": "*fp32", "totals_ptr": "*fp32"}
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in fixed else types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(kernel, signature, {n: v for n, v in fixed.items() if n in names})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": rotary.WARPS}).asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("pairs", [32, pytest.param(24, marks=slow), pytest.param(64, marks=slow)])
def test_the_kernels_compile_for_an_h100_on_any_machine(pairs, tmp_path):
    """Down to machine code, with the compiler that Triton brings along; no GPU takes part."""
    assert [size > 1000 for size in sizes_compiled(COMPILE, tmp_path, pairs)] == [True] * 4


@needs_cuda
@pytest.mark.parametrize(("B", "H", "T", "D"), [(8, 12, 512, 64), (2, 8, 1000, 96), (1, 4, 16_384, 128)])
def test_compiled_kernels_at_full_size(B, H, T, D):
    generator = torch.Generator().manual_seed(D)
    f = torch.rand(B, T, H, generator=generator).transpose(1, 2).to(DEVICE)
    compare(random_qkv(B, H, T, D, torch.bfloat16, generator), f, inclusive=True, generator=generator)
