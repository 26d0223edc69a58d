"""Training: tokens/s, MFU and memory of a step, each encoding beside the others and beside another checkout's model.

    python bench.py train config/tiny.toml --micro_batch=4 --encodings rope carope
    python bench.py train config/small.toml --synthetic --vs ../nanoGPT --vs ../build-nanogpt
    python bench.py train config/small.toml --synthetic --encodings rope rope,kernel=triton rope,residual=bfloat16

The matmul rate that MFU is measured against is taken in every round, too. `bare` is forward, backward and optimizer alone, on
tokens that are there already. Under torchrun each rank does all of it, and tokens/s are those of all ranks.
"""

import argparse
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags; what is left of the command line is the configuration."""
    add = parser.add_argument
    add(
        "--encodings",
        nargs="+",
        metavar="NAME",
        help="encodings to interleave, the baseline first; with options as rope,kernel=triton [default: the config's]",
    )
    add("--micro_steps", type=int, default=1, help="micro-batches of a step [default: 1]")
    add("--rounds", type=int, default=20, help="rounds that count, each times every candidate once [default: 20]")
    add("--warmup", type=int, default=3, help="rounds before, which do not count [default: 3]")
    add("--synthetic", action="store_true", help="random tokens instead of the config's shards")
    add("--no_bare", action="store_true", help="leave out the bare step")
    add("--vs", action="append", default=[], metavar="PATH", help="checkout with a nanoGPT-style model.py or train_gpt2.py")
    add("--vs_tuned", action="store_true", help="the peers in our dtype and compiled on a CPU too; else as they ship")
    add("--profile", metavar="FILE", help="also write a table of the operations of the baseline's step")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Time the candidates of the command line; prints a line each, returns the baseline's figures and all `results`."""
    from benchmarks.trainee import bench_config, bench_data
    from distributed import Distributed

    cfg = bench_config(rest, args.micro_steps)
    with Distributed.start(cfg.device, cfg.dtype) as dist, bench_data(cfg, args.synthetic) as cfg:
        names = args.encodings or [cfg.encoding]
        return time_candidates(args, {name: bench_config(rest, args.micro_steps, name, cfg.data) for name in names}, dist)


def time_candidates(args: argparse.Namespace, cfgs: dict[str, Any], dist: Any) -> dict[str, Any]:
    """Build a trainee per configuration, by its name, and the peers, interleave them, and say what came out."""
    from benchmarks.measure import interleave, matmul
    from benchmarks.peers import Peer
    from benchmarks.trainee import Trainee

    peers = [Peer(Path(path), next(iter(cfgs.values())), str(dist.device), args.vs_tuned) for path in args.vs]
    trainees, about = [], []
    for name, cfg in cfgs.items():
        begin = time.perf_counter()
        trainees.append(Trainee(cfg, dist, name))
        trainees[-1].whole()
        about.append(trainees[-1].describe() | {"first_step_seconds": round(time.perf_counter() - begin, 2)})
    mm, mm_flops = matmul(dist.device, dist.dtype)
    work: dict[str, Any] = {"matmul": mm} | {t.name: t.whole for t in trainees}
    if not args.no_bare:
        work |= {f"{t.name}, bare": t.bare for t in trainees}
    work |= {peer.name: peer.step for peer in peers}
    for trainee in trainees:
        trainee.batches.waited = 0.0
    seconds = interleave(work, args.rounds, args.warmup, dist.device)
    if args.profile and dist.is_main:
        write_profile(trainees[0], Path(args.profile))
    result = summarize(trainees, about, peers, seconds, mm_flops, args.rounds + args.warmup)
    if dist.is_main:
        show(result)
    for trainee in trainees:
        trainee.close()
    for peer in peers:
        peer.close()
    return result


def summarize(
    trainees: list[Any], about: list[dict[str, Any]], peers: list[Any], seconds: dict[str, list[float]], flops: int, rounds: int
) -> dict[str, Any]:
    """The baseline's figures, the conditions they share, and all `results`."""
    from benchmarks.measure import speedup, spread

    dist, base = trainees[0].dist, trainees[0].cfg
    tokens, peak = base.tokens_per_step, dist.peak_flops()
    mm = spread(seconds["matmul"], 1)
    mm_rate = 1e3 * flops / mm["ms_median"]
    results = []
    for trainee, known in zip(trainees, about, strict=True):
        name = trainee.name
        one = known | spread(seconds[name], tokens) | {"vs_baseline": speedup(seconds[name], seconds[trainees[0].name])}
        rate = one["tokens_per_second"] / dist.world_size * trainee.cfg.flops_per_token
        one |= {
            "tokens_per_second_per_device": round(one["tokens_per_second"] / dist.world_size, 1),
            "mfu_measured": round(rate / mm_rate, 4),
            "mfu": round(rate / peak, 4) if peak else None,
            "data_wait_share": round(trainee.batches.waited / rounds * 1e3 / one["ms_median"], 5),
        }
        if f"{name}, bare" in seconds:
            bare = seconds[f"{name}, bare"]
            one |= {"bare_ms_median": spread(bare, tokens)["ms_median"], "whole_over_bare": speedup(bare, seconds[name])}
        results.append(one)
    theirs = []
    for peer in peers:
        ratio = speedup(seconds[trainees[0].name], seconds[peer.name])
        theirs.append({"peer": peer.name, "ours_over_theirs": ratio} | spread(seconds[peer.name], tokens))
    return {
        **results[0],
        "matmul_tflops": round(mm_rate / 1e12, 4),
        "matmul_ms": [mm["ms_p10"], mm["ms_median"], mm["ms_p90"]],
        "dtype": str(dist.dtype).removeprefix("torch."),
        "world_size": dist.world_size,
        "compiled": dist.compiles(base),
        "config": base.model_dump(exclude={"name", "out_dir"}),
        "results": results,
        "peers": theirs,
    }


def show(result: dict[str, Any]) -> None:
    """The result for people."""
    cfg = result["config"]
    print(
        f"{cfg['n_layer']} layers, {cfg['n_head']} heads, width {cfg['n_embd']}, {cfg['micro_batch']} × {cfg['block_size']}, "
        f"{result['dtype']}; matmul {result['matmul_tflops']:.3f} TFLOP/s"
    )
    print(f"{result['flops_per_token']:,} FLOPs per token = 6 (12 L C² + V C) + 12 L C T")
    print(f"{'':28}{'ms':>10}{'p10':>10}{'p90':>10}{'tokens/s':>12}{'ratio':>8}{'MFU':>8}{'bare':>8}")
    for one in result["results"]:
        bare = f"{one['whole_over_bare']:.3f}" if "whole_over_bare" in one else "–"
        print(times(one["candidate"], one, one["vs_baseline"]) + f"{one['mfu_measured']:>8.1%}{bare:>8}")
    for peer in result["peers"]:
        print(times(peer["peer"], peer, 1 / peer["ours_over_theirs"]))
    print("ratio: speed over the first line's; MFU: of the matmul rate; bare: whole step over forward, backward, optimizer")


def times(name: str, one: dict[str, Any], ratio: float) -> str:
    """A line's beginning."""
    spread = "".join(f"{one[key]:>10.1f}" for key in ("ms_median", "ms_p10", "ms_p90"))
    return f"{name:28}{spread}{one['tokens_per_second']:>12,.0f}{ratio:>8.3f}"


def write_profile(trainee: Any, path: Path) -> None:
    """A table of what three steps of `trainee` spend their time on, by operation and shape."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainee.dist.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(3):
            trainee.whole()
    events = seen.key_averages(group_by_input_shape=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    path.write_text(events.table(sort_by=key, row_limit=40, max_name_column_width=50, max_shapes_column_width=60))
