"""Rotation of queries and keys, forward and backward: eager, compiled, and on a GPU the Triton kernels by block and warps.

    python -m lab.bench rotary
    python -m lab.bench rotary --batch=64 --length=1024 --layers=12

Beside them a plain copy of as many bytes as rotation cannot do without: q, k in and out; the gradients of q, k, v in, that of
c_attn's output out; for CARoPE also q and k once more, and f and its gradient. `of_copy` is how near one comes to that.
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from core.distributed import pick_device
from core.errors import UserError, at_least
from core.kernels import rotary
from core.kernels.support import rotation_kernel
from core.measure import interleave, speedup, spread
from positional.carope import CARoPE
from positional.rotary import RoPE

ENCODINGS = ("rope", "carope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; it takes no configuration."""
    add = parser.add_argument
    add("--batch", type=int, default=0, help="sequences [default: 32 on a GPU, 1 on a CPU]")
    add("--heads", type=int, default=12, help="attention heads [default: 12]")
    add("--length", type=int, default=512, help="tokens of a sequence [default: 512]")
    add("--head_width", type=int, default=64, help="channels of a head [default: 64]")
    add("--layers", type=int, default=1, help="layers that share one f, as CARoPE's do [default: 1]")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of q, k and v [default: bfloat16]")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="[default: auto, cuda where there is one]")
    add("--rounds", type=int, default=20, help="rounds that count [default: 20]")
    add("--warmup", type=int, default=3, help="rounds before, which do not count [default: 3]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Interleave the candidates; prints and returns milliseconds, GB/s and the distance to a copy of each."""
    if rest:
        raise UserError(f"{rest[0]}: lab.bench rotary has no such option; --help lists them")
    at_least(0, batch=args.batch)
    at_least(1, heads=args.heads, length=args.length, layers=args.layers)
    at_least(2, head_width=args.head_width)
    if args.head_width % 2:
        raise UserError(f"--head_width = {args.head_width}: must be even, as pairs of channels are rotated")
    device = pick_device(args.device)
    args.batch = args.batch or (32 if device.type == "cuda" else 1)
    n_bytes = {encoding: _floor(args, encoding) for encoding in ENCODINGS}
    work: dict[str, Callable[[], object]] = {}
    for encoding in ENCODINGS:
        work[f"{encoding} copy"] = _copy(n_bytes[encoding], device)
        work |= {f"{encoding} {name}": call for name, call in _candidates(args, encoding, device).items()}
    seconds = interleave(work, args.rounds, args.warmup, device)
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        encoding = name.split()[0]
        one = spread(times, args.batch * args.length) | {"of_copy": speedup(times, seconds[f"{encoding} copy"])}
        one["gb_per_second"] = round(n_bytes[encoding] / one["ms_median"] / 1e6, 2)
        found[name] = one
        print(
            f"{name:16} {one['ms_median']:9.3f} ms  {one['gb_per_second']:8.1f} GB/s  {one['of_copy']:6.1%} of a copy's speed"
        )
    shape = {key: getattr(args, key) for key in ("batch", "heads", "length", "head_width", "layers", "dtype")}
    return {"shape": shape, "floor_bytes": n_bytes, "rotary": found}


def _floor(args: argparse.Namespace, encoding: str) -> int:
    """Bytes that a forward and backward pass over all layers must move."""
    per_head = args.batch * args.heads * args.length
    unit = per_head * args.head_width * (2 if args.dtype == "bfloat16" else 4)
    once = 4 * per_head * 3 if encoding == "carope" else 0  # f twice, its gradient
    return args.layers * (12 if encoding == "carope" else 10) * unit + once


def _copy(n_bytes: int, device: Any) -> Callable[[], object]:
    """Half of `n_bytes` read, and as many written."""
    source, copied = torch.zeros(2, n_bytes // 2, dtype=torch.uint8, device=device)
    return lambda: copied.copy_(source)


def _candidates(args: argparse.Namespace, encoding: str, device: Any) -> dict[str, Callable[[], object]]:
    """A forward and backward pass over all layers by each way of rotating."""

    class GivenF(CARoPE):
        """CARoPE whose f is given in place of embeddings."""

        def frequency(self, x_BTC: torch.Tensor) -> torch.Tensor:
            return x_BTC

    B, H, T, D = args.batch, args.heads, args.length, args.head_width
    cfg = SimpleNamespace(n_embd=H * D, n_head=H, rope_base=10000.0, kernel="eager")
    one: RoPE = GivenF(cfg) if encoding == "carope" else RoPE(cfg)
    generator = torch.Generator(device).manual_seed(1)
    dtype, pos_T = getattr(torch, args.dtype), torch.arange(T, device=device)
    layers = [torch.randn(B, T, 3, H, D, generator=generator, device=device).to(dtype) for _ in range(args.layers)]
    grads = [torch.randn(B, T, H, D, generator=generator, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
    f = 0.5 + 0.4 * torch.rand(B, T, H, generator=generator, device=device).transpose(1, 2)
    x = f if encoding == "carope" else torch.empty(B, T, 0, device=device)  # RoPE reads its length alone
    inputs = [u.requires_grad_() for u in (layers if encoding == "rope" else [*layers, x])]

    def eager() -> list[torch.Tensor]:
        frame = one(x, pos_T).frame
        split = ((u_BTHD.transpose(1, 2) for u_BTHD in packed.unbind(2)) for packed in layers)
        return [u for q, k, v in split for u in (one.rotate(q, frame), one.rotate(k, frame), v)]

    def fused() -> list[torch.Tensor]:
        rotation = kernel(one.frequency(x), one.n_pairs, one.inclusive)
        return [u for packed in layers for u in rotation(packed.permute(2, 0, 3, 1, 4))]

    def both(forward: Callable[[], list[torch.Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), inputs, grads * args.layers)

    def tuned(block: int, warps: int) -> Callable[[], object]:
        def call() -> object:
            rotary.BLOCK, rotary.WARPS = block, warps
            return both(fused)()

        return call

    found = {"eager": both(eager), "compiled": both(torch.compile(eager, dynamic=False))}
    kernel = rotation_kernel("triton")
    if kernel and device.type == "cuda":
        found |= {f"triton {block}/{warps}": tuned(block, warps) for block in (2048, 1024) for warps in (4, 8)}
    return found
