"""Each encoding on an H100 that is not there: what is wrong with it, as JSON. tests/test_fake_gpu.py runs it.

    python -m tests.fake_gpu eager rope cable                 train, evaluate and decode, of which there are but shapes
    python -m tests.fake_gpu bfloat16 rope cable              compile a micro-step and each kernel that Inductor writes for it
    python -m tests.fake_gpu float32 rope,kernel=triton       the same in float32, with other options than the defaults

Of what CUDA alone shows, shapes, devices and types are seen, and that the code compiles and into how many registers; no number.
"""

import json
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda import pretend

SHAPE = ["--n_head=4", "--n_embd=256", "--vocab_size=1024", "--block_size=192", "--micro_batch=2", "--tokens_per_step=384"]


def main() -> None:
    """Print {name: [what is wrong]}, and for people what the kernels take."""
    mode, *names = sys.argv[1:]
    pretend()  # before torch comes
    from core.config import load_config

    wrong: dict[str, list[str]] = {}
    for name in names:
        encoding, *options = name.split(",")
        cfg = load_config([*SHAPE, f"--encoding={encoding}", *(f"--{option}" for option in options)])
        try:
            wrong[name] = list(steps(cfg) if mode == "eager" else kernels(cfg, mode == "bfloat16"))
        except Exception as error:
            ours = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)]
            wrong[name] = [f"{type(error).__name__}: {str(error)[:1000]} ({' '.join(ours[-12:])})"]
        print(name, wrong[name], file=sys.stderr, flush=True)
    print(json.dumps(wrong))


def steps(cfg: Any) -> Iterator[str]:
    """What is wrong when a model of two layers takes a step, evaluates longer texts than in training, and decodes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from core.evaluate import losses
    from model import GPT, KVCache

    calls = noted_attention()
    with FakeTensorMode():  # which raises where devices differ, and where the host would need a value
        model = GPT(cfg.model_copy(update={"n_layer": 2}))
        move(model)
        ids = torch.empty((2, 700), dtype=torch.int64, device="cuda")
        long, short = ids[:, : model.max_len], ids[:, :192]
        for bf16 in (False, True):
            with refuse_cpu(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                model(short, short).backward()
                yield from (f"{name} has no gradient" for name, p in model.named_parameters() if p.grad is None)
                model.zero_grad()
                calls.clear()
                with torch.no_grad():
                    assert losses(model, long, long).shape == long.shape
                    if any(may_be_cudnn for is_masked, may_be_cudnn in calls if is_masked):
                        yield "evaluation: cuDNN would compile a plan for every block of attention"
                    calls.clear()
                    cache = KVCache()
                    parts = [model(part, cache=cache) for part in short.split([100, 1, 1, 90], dim=1)]
                    assert torch.cat(parts, 1).shape == (2, 192, 1024)
                    if any(may_be_cudnn for _, may_be_cudnn in calls):
                        yield "decoding: cuDNN would compile a plan for every token"


def noted_attention() -> list[tuple[bool, bool]]:
    """Of each call of torch's attention from now on, whether it had a mask and whether cuDNN's might be taken."""
    import torch
    from torch.nn import functional

    calls: list[tuple[bool, bool]] = []
    attention = functional.scaled_dot_product_attention

    def noting(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> Any:
        calls.append((attn_mask is not None, q.dtype == torch.bfloat16 and torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(q, k, v, attn_mask=attn_mask, **options)

    functional.scaled_dot_product_attention = noting
    return calls


def refuse_cpu() -> Any:
    """A context in which a tensor made on the CPU is an error: to move it to the GPU makes the host wait."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class RefuseCPU(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            for one in made if isinstance(made, Iterable) and not isinstance(made, torch.Tensor) else [made]:
                assert not isinstance(one, torch.Tensor) or one.is_cuda, f"{function} on the CPU"
            return made

    return RefuseCPU()


def write_code(cfg: Any, take: Callable[[str], None], bf16: bool) -> None:
    """Call `take` with the code of the forward pass and with that of the backward pass."""
    import torch
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import GPT

    def instead(graph: Any) -> Any:
        """In place of compiling what was written and loading it."""
        take(graph.codegen()[0].value)
        graph.cache_key = graph.cache_path = ""
        graph.cache_linemap = []
        return SimpleNamespace(call=lambda inputs: None, __file__="", recursively_apply_fns=None, runner=None, key="", path="")

    for name in ("compile_to_module", "_compile_to_module"):
        setattr(GraphLowering, name, instead)
    torch.compiler.reset()
    model = GPT(cfg)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        inductor.patch({"force_disable_caches": True, "triton.unique_kernel_names": False}),
        functorch.patch(force_non_lazy_backward_lowering=True),
        torch.autocast("cuda", torch.bfloat16, enabled=bf16),
    ):
        move(model)
        ids = torch.empty((cfg.micro_batch, cfg.block_size), dtype=torch.int64, device="cuda")
        torch.compile(model, dynamic=False, fullgraph=True)(ids, ids)


def move(model: Any) -> None:
    """Give `model` parameters and buffers on the GPU, of which there are but shapes: `to` would have values to copy."""
    import torch

    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device="cuda")


def kernels(cfg: Any, bf16: bool) -> Iterator[str]:
    """What is wrong with the kernels that Inductor writes for a micro-step of one layer."""
    codes: list[str] = []
    write_code(cfg.model_copy(update={"n_layer": 1}), codes.append, bf16)
    for source in re.findall(r"async_compile\.triton\('\w+', '''\n(.*?)''', device_str='cuda'\)", "".join(codes), re.S):
        name = "".join(re.findall(r"'kernel_name': '(\w+?)(?:_\d+)?'", source)[:1])
        source = re.sub(r"'kernel_name': '\w+'", f"'kernel_name': '{name}'", source)
        if source in compiled:
            continue
        compiled.add(source)
        registers, stack = min(registers_and_stack(source), key=lambda one: one[1])
        print(f"{registers:4} registers {stack:5} bytes of stack  {name}", file=sys.stderr)
        if stack > MOST_STACK:
            yield f"{name}: {registers} registers and {stack} bytes of stack"


MOST_STACK = 64  # bytes a thread: a sine in float64 has a table of 48 for large angles; more is registers that do not fit
compiled: set[str] = set()  # sources of kernels that were compiled; encodings share most


def registers_and_stack(source: str) -> list[tuple[int, int]]:
    """What each configuration of a kernel of Inductor's takes, compiled for an H100: registers, and bytes of stack a thread."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    kernel = next(one for one in vars(PyCodeCache.load(source)).values() if isinstance(one, CachingAutotuner))
    kernel.precompile(warm_cache_only=True)
    found = []
    for result in kernel.compile_results:
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found += [(int(n), int(stack)) for n, stack in re.findall(r"REG:(\d+) STACK:(\d+)", listed)]
    return found


if __name__ == "__main__":
    main()
