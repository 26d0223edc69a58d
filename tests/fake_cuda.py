"""An H100 that is not there: Inductor writes the code that one would run. Shapes go in, code comes out, and nothing runs.

It stands on private parts of torch 2.13, for looking at the code and for nothing else. `pretend` leaves its process unable to
compute. Attention, a library's kernel on a GPU, is an operator of its shapes here.
"""

import ctypes
import runpy
import subprocess
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from core.errors import UserError

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 * 2**30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120, gcnArchName="",
)  # fmt: skip

# What torch's dispatcher asks of a device before it looks at shapes
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
const Device gpu(DeviceType::CUDA, 0);
const Stream stream(Stream::DEFAULT, gpu);
struct Guard final : public impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
static impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());
struct CUDAHooks final : public at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
"""


def pretend() -> None:
    """Have torch, not yet imported, believe in an H100. Raises UserError without a C++ compiler, or for a build for CUDA."""
    load_guard()
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config as inductor
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton

    torch.version.cuda = "13.0"
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
            "get_device_capability": (9, 0), "get_device_name": H100.name, "is_bf16_supported": True, "_lazy_init": None,
            "synchronize": None, "set_device": None, "set_rng_state": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "_exchange_device": 0, "_maybe_exchange_device": 0,
        },
        CudaInterface: {"is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
                        "get_compute_capability": 90, "set_device": None, "get_raw_stream": 0},
        CudaInterface.Worker: {"get_device_properties": H100, "current_device": 0},
        torch._C: {"_cuda_getCurrentRawStream": 0, "_cuda_setDevice": 0, "_cuda_getDevice": 0, "_cuda_synchronize": None},
        joint_graph: {"lazy_init": None},
        _triton: {"triton_hash_with_backend": "none"},
    }  # fmt: skip
    for owner, names in answers.items():
        for name, answer in names.items():
            function = lambda *_args, answer=answer, **_words: answer  # noqa: E731
            setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor.use_static_triton_launcher = False
    inductor.joint_graph_constant_folding = False
    inductor.compile_threads = 1
    torch.nn.functional.scaled_dot_product_attention = attention_of_shapes()


def load_guard() -> None:
    """Compile GUARD against torch's headers and load it."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    if runpy.run_path(str(home / "version.py"))["cuda"]:
        raise UserError(
            "tests.fake_gpu: this torch was built for CUDA and knows that there is no H100; its CPU build takes one"
        )
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        words = [
            "c++",
            "-O0",
            "-std=c++20",
            "-shared",
            "-fPIC",
            *(f"-I{home}/include{sub}" for sub in ("", "/torch/csrc/api/include")),
        ]
        words += [str(source), f"-L{home}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home}/lib", "-o", str(library)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"tests.fake_gpu: needs a C++ compiler, as `make test` does ({error})") from None
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def attention_of_shapes() -> Any:
    """In place of scaled_dot_product_attention: an operator with its shapes and strides, and another for its backward pass."""
    import torch
    from torch import Tensor

    def like(u: Tensor) -> Tensor:  # flash attention's, in memory as (B, T, H, D)
        B, H, T, D = u.shape
        return u.new_empty(B, T, H, D).transpose(1, 2)

    @torch.library.custom_op("fake::attention", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return like(q)

    @torch.library.custom_op("fake::attention_backward", mutates_args=())
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, mask: Tensor | None) -> list[Tensor]:
        return [like(q), like(k), like(v), *([] if mask is None else [torch.empty_like(mask)])]

    def leave(ctx: Any, inputs: Any, output: Tensor) -> None:
        q, k, v, mask = inputs
        ctx.save_for_backward(q, k, v, output, mask)

    def back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [*backward(grad, *ctx.saved_tensors)]
        return *found[:3], found[3] if ctx.needs_input_grad[3] else None

    forward.register_fake(lambda q, k, v, mask: like(q))
    backward.register_fake(
        lambda grad, q, k, v, y, mask: [like(q), like(k), like(v), *([] if mask is None else [torch.empty_like(mask)])]
    )
    forward.register_autograd(back, setup_context=leave)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_options: Any) -> Tensor:
        kind, (B, H, T, _), S = q.device.type, q.shape, k.size(2)
        if torch.is_autocast_enabled(kind):
            q, k, v = (u.to(torch.get_autocast_dtype(kind)) for u in (q, k, v))
        given = [u for u in (q, k, v, attn_mask) if u is not None]
        assert all(u.device == q.device for u in given) and k.dtype == v.dtype == q.dtype
        if attn_mask is not None:
            assert attn_mask.dtype in (torch.bool, q.dtype)
            assert torch.broadcast_shapes(attn_mask.shape, (B, H, T, S)) == (B, H, T, S)
        return forward(q, k, v, attn_mask)

    return attention
