"""What an H100 would run in a micro-step, on any machine: kernels, bytes and FLOPs of the code that Inductor writes for one.

    python -m lab.bench.codegen config/small.toml --encodings rope carope carope_hidden
    python -m lab.bench.codegen config/tiny.toml --micro_batch=32 --show                 each kernel, the largest first

It needs a C++ compiler and no GPU, so what comes out is an estimate. Milliseconds are bytes over the bandwidth and FLOPs over
the rate that are reached (the defaults of the options); launches cost nothing. Attention counts by its FLOPs. Of the update of
the weights, only the adding up of gradients is in it.
"""

import argparse
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core.console import CommandLine, new_file, this_command
from core.errors import command
from core.files import write_json
from lab.bench.fake_cuda import pretend

# The part a kernel belongs to: the first whose pattern is found in what it computes or in where that stands in our sources
PARTS = {
    "LayerNorm and residual": r"layer_norm",
    "loss": r"cross_entropy",
    "positions": r"positional/",
    "GELU": r"gelu",
    "bias gradients": r"\bsum\b",
    "types and layouts": r"",
}


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it for the configuration."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--encodings", nargs="+", metavar="NAME", help="encodings to look at, each by itself [default: the config's]")
    add("--bandwidth", type=float, default=2.75, metavar="TB/s", help="of memory, reached [default: 2.75, of 3.35]")
    add("--matmul", type=float, default=650, metavar="TFLOP/s", help="rate of matmuls, reached [default: 650, of 989]")
    add("--attention", type=float, default=250, metavar="TFLOP/s", help="rate of attention, reached [default: 250]")
    add("--show", action="store_true", help="also a line for each kind of kernel")
    add("--json", type=new_file, metavar="FILE", help="also write the result there")
    return parser.parse_known_args()


@command
def main() -> None:
    """Compile each encoding's micro-step and print its parts."""
    args, rest = parse_args()
    pretend()  # before torch comes, which the configuration brings
    from core.config import load_config

    cfgs = [load_config([*rest, *([f"--encoding={name}"] if name else [])]) for name in args.encodings or [""]]
    import torch

    from core.provenance import git_version

    results = []
    for cfg in cfgs:
        kernels, n_params = micro_step(cfg)
        results.append(estimate(cfg, kernels, n_params, args))
        show(results[-1], kernels if args.show else [])
    if args.json:
        about = {"command": shlex.join(["python", *this_command()]), "git": git_version()}
        write_json(Path(args.json), {**about, "torch": torch.__version__, "estimated": True, "results": results})


def micro_step(cfg: Any) -> tuple[list[dict[str, Any]], int]:
    """The kernels of a forward and a backward pass, {part, name, bytes, flops} each, and the model's number of parameters."""
    kernels: list[dict[str, Any]] = []
    model = write_code(cfg, lambda graph, _code: kernels.extend(kernels_of(graph)))
    return kernels, model.n_params()["total"]


def write_code(cfg: Any, take: Callable[[Any, str], None], bf16: bool = True) -> Any:
    """Call `take` with the graph of the forward pass and with that of the backward pass, and the code of each; → the model."""
    import torch
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import GPT

    def instead(graph: Any) -> Any:
        """In place of compiling what was written and loading it."""
        take(graph, graph.codegen()[0].value)
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
    return model


def move(model: Any) -> None:
    """Give `model` parameters on the GPU, of which there are but shapes: `to` would have values to copy."""
    import torch

    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"))


def kernels_of(graph: Any) -> list[dict[str, Any]]:
    """What the scheduler of a graph launches; views and parts of others' outputs are nothing."""
    from torch._inductor.virtualized import V

    found = []
    with V.set_graph_handler(graph):
        for node in graph.scheduler.nodes:
            inner = [one.node for one in node.get_nodes() if one.node is not None]
            if node.is_extern() and any(kind in type(inner[0]).__name__ for kind in ("MultiOutput", "Nop")):
                continue
            origins = {origin for one in inner for origin in one.origins}
            before = (str(origin.meta.get("original_aten") or origin.target) for origin in origins)  # before decomposition
            operations = " ".join(sorted({re.sub(r"^(aten|prims)\.|\.\w+$", "", one) for one in before}))
            where = " ".join(path for origin in origins for path in re.findall(r'/(\w+/\w+\.py)"', origin.stack_trace or ""))
            library = str(getattr(inner[0], "python_kernel_name", None) or "") if node.is_extern() else ""
            flops = sum(map(matmul_flops, origins)) if library.endswith("mm") else 0
            part = "matmuls" if flops else "attention" if "fake.attention" in library else None
            part = part or next(part for part, sign in PARTS.items() if re.search(sign, f"{operations} {where}"))
            size = 0 if part in ("matmuls", "attention") else bytes_of(node)
            found.append({"part": part, "name": f"{library} {operations}".strip(), "flops": flops, "bytes": size})
    return found


def matmul_flops(origin: Any) -> int:
    """FLOPs of a matmul of the graph; 0 of anything else."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(getattr(origin.target, "overloadpacket", None))
    return count(*(one.meta["val"] for one in origin.all_input_nodes), out_val=origin.meta["val"]) if count else 0


def bytes_of(node: Any) -> int:
    """What a kernel reads and writes; of a buffer that it scatters into, nothing, for it touches a few elements."""
    scattered = {dep.name for dep in node.read_writes.writes if getattr(dep, "mode", None)}
    moved = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    return int(sum(size for name, size in moved.items() if name not in scattered))


def estimate(cfg: Any, kernels: list[dict[str, Any]], n_params: int, args: argparse.Namespace) -> dict[str, Any]:
    """Launches, GB, TFLOP and milliseconds of each part, and of the whole."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: {"launches": 0, "gb": 0.0, "tflop": 0.0, "ms": 0.0})
    tokens = cfg.micro_batch * cfg.block_size
    for kernel in kernels:
        part = parts[kernel["part"]]
        part["launches"] += 1
        part["gb"] += kernel["bytes"] / 1e9
        part["tflop"] += kernel["flops"] / 1e12
    # Half of T² each way: two matmuls forward, five backward
    parts["attention"]["tflop"] = 7 * cfg.n_layer * tokens * cfg.block_size * cfg.n_embd / 1e12
    # Outside of the graph: of all but the first micro-step each gradient is read, and the sum read and written, in fp32
    parts["sum of gradients"]["gb"] = 3 * 4 * n_params / 1e9
    for name, part in parts.items():
        rate = args.attention if name == "attention" else args.matmul
        part["ms"] = 1e3 * (part["gb"] / 1e3 / args.bandwidth + part["tflop"] / rate)
    ms = sum(part["ms"] for part in parts.values())
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]["ms"]))
    return {
        "encoding": cfg.encoding, "config": cfg.model_dump(exclude={"name", "out_dir"}), "tokens": tokens, "ms": round(ms, 2),
        "tokens_per_second": round(1e3 * tokens / ms),
        "launches": sum(int(part["launches"]) for part in parts.values()),
        "gb": round(sum(part["gb"] for part in parts.values()), 2),
        "parts": {name: {key: round(value, 3) for key, value in part.items()} for name, part in ordered.items()},
    }  # fmt: skip


def show(result: dict[str, Any], kernels: list[dict[str, Any]]) -> None:
    """The result for people, and a line for each kind of the kernels given."""
    cfg = result["config"]
    print(f"{cfg['encoding']}, {cfg['n_layer']} × {cfg['n_embd']}, {cfg['micro_batch']} × {cfg['block_size']}: estimated")
    print(f"{'':28}{'launches':>9}{'GB':>9}{'TFLOP':>9}{'ms':>9}")
    for name, part in result["parts"].items():
        print(f"{name:28}{part['launches']:>9.0f}{part['gb']:>9.2f}{part['tflop']:>9.2f}{part['ms']:>9.2f}")
    rate = f"{result['tokens_per_second']:,} tokens/s"
    print(f"{'all':28}{result['launches']:>9}{result['gb']:>9.2f}{'':9}{result['ms']:>9.2f}  {rate}\n")
    kinds: dict[str, list[int]] = defaultdict(list)
    for kernel in kernels:
        kinds[f"{kernel['part']}: {kernel['name']}"].append(kernel["bytes"])
    for name, sizes in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(sizes) / 1e9:9.3f} GB in {len(sizes):3}  {name[:150]}")


if __name__ == "__main__":
    main()
