"""The time of a training step on n GPUs, by parts, and with it the hours and the dollars of a run: a model, in plain Python.

Formulas, sources and assumptions are on docs/scaling.md. Times are in seconds, sizes in bytes, rates per second; a bandwidth is
that of one GPU in one direction. Start-up, compilation, loader and logs are taken to cost nothing.
"""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config
from core.errors import UserError
from core.files import ROOT
from core.tables import table

H100_FLOPS = 989.4e12  # dense bf16 by the data sheet, as distributed.PEAK_TFLOPS has it
EVALUATION_SET = 100_000_000  # tokens of shard 0, what final_eval_tokens = 0 means with prepare_fineweb.py's defaults
ADAMW_BYTES = (
    7 + 3
) * 4  # per parameter: AdamW reads p, g, m, v and writes p, m, v; clipping reads g, then reads and writes it
CHECKPOINT_BYTES = 3 * 4  # per parameter: weights and AdamW's two averages
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # torch's DDP closes a bucket once it holds as much
MEASURED = ROOT / "results/gpu-bench.json"


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them; as it stands H100 SXM in nodes of eight with one network adapter a GPU."""

    flops: float = 0.4 * H100_FLOPS  # per GPU, reached in forward and backward: an assumption until measured
    measured_on: str = ""  # the device `flops` was measured on, empty where it is assumed
    gpus_per_node: int = 8
    nvlink: float = 450e9  # data sheet: 900 GB/s, both directions together
    network: float = 50e9  # 400 Gb/s InfiniBand for each GPU, as in a DGX H100
    efficiency: float = 0.7  # share of a data sheet's bandwidth that is reached, on links and in memory: an assumption
    nvlink_latency: float = 3.4e-6  # a hop of NCCL's ring, from the constants of its own model (src/graph/tuning.cc, Simple)
    network_latency: float = 14e-6
    hbm: float = 3.35e12  # data sheet
    disk: float = 0.59e9  # results/faults.json: 536 MB in 0.91 s, on another machine
    dollars: float = 2.5  # per GPU-hour: an assumption, prices differ and change


@dataclass(frozen=True)
class Prediction:
    """What the model says of one configuration on `gpus` GPUs: times of a step's parts, and of a run's."""

    gpus: int
    nodes: int
    micro_batch: int  # sequences, the configuration's or the largest below it that divides
    grad_accum: int
    steps: int
    tokens_per_step: int
    compute: float  # forward and backward of all micro-steps
    exchanged: float  # bytes each GPU sends, and receives, per step
    exchange: float
    exposed: float  # part of `exchange` that no backward hides
    optimizer: float
    evaluation: float  # of the whole run
    checkpoints: float  # of the whole run
    price: float  # dollars per GPU-hour
    memory: float  # bytes of a GPU at the peak of a step
    sharded: bool  # FSDP: each GPU updates its share of the parameters

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step

    @property
    def efficiency(self) -> float:
        """Tokens/s per GPU in a step, as a share of those of one GPU alone."""
        alone = self.gpus * self.compute + self.optimizer * (self.gpus if self.sharded else 1)
        return alone / (self.gpus * self.step)

    @property
    def hours(self) -> float:
        return (self.steps * self.step + self.evaluation + self.checkpoints) / 3600

    @property
    def dollars(self) -> float:
        return self.hours * self.gpus * self.price


def predict(cfg: Config, gpus: int, machine: Machine | None = None) -> Prediction:
    """A run of `cfg` on `gpus` GPUs; `machine` None is eight H100s a node at the measured rate, if there is one.

    Raises UserError where the GPUs do not fill their nodes, or the batch cannot be split among them.
    """
    machine = machine or machine_for(cfg)
    nodes = n_nodes(gpus, machine)
    micro_batch, accum = split(cfg, gpus)
    forward = cfg.tokens_per_step / accum * cfg.flops_per_token / 3 / gpus / machine.flops  # of a micro-step
    again = forward * block_share(cfg) if cfg.activation_checkpointing else 0.0
    exchanged, exchange, exposed = (fsdp if cfg.parallel == "fsdp" else ddp)(cfg, gpus, machine, forward, again, accum)
    return Prediction(
        gpus=gpus,
        nodes=nodes,
        micro_batch=micro_batch,
        grad_accum=accum,
        steps=cfg.steps,
        tokens_per_step=cfg.tokens_per_step,
        compute=accum * (3 * forward + again),
        exchanged=exchanged,
        exchange=exchange,
        exposed=exposed,
        optimizer=ADAMW_BYTES * n_params(cfg) / (gpus if cfg.parallel == "fsdp" else 1) / (machine.hbm * machine.efficiency),
        evaluation=evaluation(cfg, gpus, micro_batch, machine),
        checkpoints=math.ceil(cfg.steps / cfg.save_every) * CHECKPOINT_BYTES * n_params(cfg) / machine.disk,
        price=machine.dollars,
        memory=memory(cfg, gpus, micro_batch, accum),
        sharded=cfg.parallel == "fsdp",
    )


def ddp(cfg: Config, gpus: int, machine: Machine, forward: float, again: float, accum: int) -> tuple[float, float, float]:
    """(bytes sent, seconds of it, seconds not hidden) of DDP's step: gradients, bucket by bucket, in the last backward pass."""
    buckets = ddp_buckets(cfg)
    *early, last = (all_reduce(size, gpus, machine) for size in buckets)
    exposed = max(0.0, sum(early) - (2 * forward + again)) + last
    return 2 * (gpus - 1) / gpus * sum(buckets), sum(early) + last, exposed


def fsdp(cfg: Config, gpus: int, machine: Machine, forward: float, again: float, accum: int) -> tuple[float, float, float]:
    """The same of FSDP's step, as core/fsdp.py has it.

    A micro-step gathers all parameters, and the blocks' again in its backward pass; the last one scatters the gradients. A
    block is gathered while the one before it computes. The rest of the model (embedding, head), the first block of each pass
    and the last gradients have nothing to hide behind.
    """
    rest, block = (4 * size for size in parts(cfg))
    one_way = {size: all_reduce(size, gpus, machine) / 2 for size in (rest, block)}  # a gathering, or a scattering
    compute = block_share(cfg) * forward / cfg.n_layer
    backward = 2 * compute + again / cfg.n_layer

    def behind(seconds: float, computing: float) -> float:
        return (cfg.n_layer - 1) * max(0.0, seconds - computing)

    each = one_way[rest] + 2 * one_way[block] + behind(one_way[block], compute) + behind(one_way[block], backward)
    last = behind(2 * one_way[block], backward) - behind(one_way[block], backward) + one_way[block] + one_way[rest]
    blocks = cfg.n_layer * block
    sent = (gpus - 1) / gpus * (accum * (rest + 2 * blocks) + rest + blocks)
    seconds = accum * (one_way[rest] + 2 * cfg.n_layer * one_way[block]) + one_way[rest] + cfg.n_layer * one_way[block]
    return sent, seconds, accum * each + last if gpus > 1 else 0.0


def memory(cfg: Config, gpus: int, micro_batch: int, accum: int) -> float:
    """Bytes of a GPU when a forward pass is done and everything is kept for the backward pass.

    Weights, gradients and AdamW's averages take 16 a parameter, and autocast's weights 2; FSDP keeps a share of them, the
    gradients whole until the last of several micro-steps, two blocks and the rest of the model gathered. A token takes, in each
    block, the residual stream twice, and 16 C numbers: what both norms give (2 C), q, k, v (3 C) and q and k turned (2 C), the
    output of attention (1 C), and of the MLP's hidden layer input and output (8 C); and at the end a logit per id.
    """
    P, number, residual = n_params(cfg), 4 if cfg.dtype == "float32" else 2, 2 if cfg.residual == "bfloat16" else 4
    if cfg.parallel == "fsdp" and gpus > 1:
        rest, block = parts(cfg)
        state = (12 / gpus + (4 if accum > 1 else 4 / gpus)) * P + 4 * (rest + 2 * block)
    else:
        state = (18 if number == 2 else 16) * P
    in_block = (2 * residual + 16 * number) * cfg.n_embd
    kept = cfg.n_layer * residual * cfg.n_embd + in_block if cfg.activation_checkpointing else cfg.n_layer * in_block
    return state + micro_batch * cfg.block_size * (kept + number * cfg.vocab_size)


def parts(cfg: Config) -> tuple[int, int]:
    """Parameters outside the blocks (embedding, which is the head, and last norm), and in each of them."""
    rest = (cfg.vocab_size + 2) * cfg.n_embd
    return rest, (n_params(cfg) - rest) // cfg.n_layer


def block_share(cfg: Config) -> float:
    """The part of a pass's FLOPs that is the blocks', without the head."""
    return 1 - 6 * cfg.vocab_size * cfg.n_embd / cfg.flops_per_token


def n_nodes(gpus: int, machine: Machine) -> int:
    """Nodes that `gpus` GPUs fill. Raises UserError where they leave one partly empty beside others."""
    nodes, rest = divmod(gpus, machine.gpus_per_node)
    if gpus < 1 or (rest and nodes):
        raise UserError(
            f"gpus = {gpus}: must be 1 to {machine.gpus_per_node}, or a multiple of the {machine.gpus_per_node} of a node; "
            "--gpus_per_node says how many there are"
        )
    return max(1, nodes)


def split(cfg: Config, gpus: int) -> tuple[int, int]:
    """(micro_batch, grad_accum) on each of `gpus`: the configuration's micro-batch, or the largest below it that divides.

    Raises UserError where tokens_per_step holds no equal number of sequences for each GPU.
    """
    rows, rest = divmod(cfg.tokens_per_step // cfg.block_size, gpus)
    if rest or not rows:
        raise UserError(
            f"gpus = {gpus}: must divide the {cfg.tokens_per_step // cfg.block_size} sequences of a step, "
            f"tokens_per_step = {cfg.tokens_per_step} by block_size = {cfg.block_size}"
        )
    micro_batch = next(size for size in range(min(cfg.micro_batch, rows), 0, -1) if rows % size == 0)
    return micro_batch, rows // micro_batch


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Seconds to sum `size` bytes over `gpus`: a ring in the node, and over the nodes a ring per GPU with that GPU's share.

    In the node, reduce-scatter and all-gather move (g−1)/g·size each; between N nodes 2(N−1)/N of the share, size/g, follows.
    """
    nodes = n_nodes(gpus, machine)
    local = gpus // nodes
    inside = 2 * (local - 1) * (size / local / (machine.nvlink * machine.efficiency) + machine.nvlink_latency)
    share = size / local
    between = 2 * (nodes - 1) * (share / nodes / (machine.network * machine.efficiency) + machine.network_latency)
    return inside + between


def evaluation(cfg: Config, gpus: int, micro_batch: int, machine: Machine) -> float:
    """Seconds of all validations of a run; a forward pass is a third of a training pass, GPUs without a batch wait."""
    batch = micro_batch * cfg.block_size
    seconds = batch * cfg.flops_per_token / 3 / machine.flops
    early, final = (math.ceil(math.ceil(n / batch) / gpus) for n in (cfg.eval_tokens, cfg.final_eval_tokens or EVALUATION_SET))
    return seconds * (math.ceil(cfg.steps / cfg.eval_every) * early + final)


def parameter_sizes(cfg: Config) -> Iterator[int]:
    """Elements of each parameter but the positional encoding's (at most 1.1 %), in the order backward is done with them.

    The embedding comes last: it is the head too, so its gradient is whole only when backward is back at the input.
    """
    C = cfg.n_embd
    mlp, attention = [C, 4 * C * C, 4 * C, 4 * C * C], [C, C * C, 3 * C, 3 * C * C]
    yield from (C, C)  # ln_f
    for _ in range(cfg.n_layer):
        yield from (*mlp, C, C, *attention, C, C)
    yield cfg.vocab_size * C


def n_params(cfg: Config) -> int:
    """Parameters without the positional encoding's own."""
    return sum(parameter_sizes(cfg))


def ddp_buckets(cfg: Config, cap: float = BUCKET, first: float = FIRST_BUCKET) -> list[int]:
    """Bytes of fp32 gradient that DDP exchanges at a time, in order. No parameter is divided; the last holds the embedding."""
    buckets: list[int] = []
    held = 0
    for size in parameter_sizes(cfg):
        held += 4 * size
        if held >= (cap if buckets else first):
            buckets.append(held)
            held = 0
    return [*buckets, held] if held else buckets


def machine_for(cfg: Config, path: Path = MEASURED) -> Machine:
    """Eight H100s a node, with the rate that `path` holds for the configuration or another encoding of its size.

    The file is what lab.bench writes: {"device": …, "results": [{"config": a name, or an object with one, and
    "flops_per_second", or "tokens_per_second" (and "flops_per_token", "world_size")}, …]}; what else is there is passed over.
    """
    try:
        report = json.loads(path.read_text())
        rows, device = report["results"], str(report.get("device", "a GPU"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Machine()
    found: dict[str, list[float]] = {}
    for row in rows if isinstance(rows, list) else []:
        name, rate = _measured(row, cfg)
        if rate:
            found.setdefault(name, []).append(rate)
    size = cfg.name.split("-")[0]
    rates = found.get(cfg.name) or [rate for name in found if name.split("-")[0] == size for rate in found[name]]
    return Machine(flops=statistics.median(rates), measured_on=device) if rates else Machine()


def _measured(row: Any, cfg: Config) -> tuple[str, float | None]:
    """(configuration's name, FLOP/s per GPU) of a row of the benchmark's results; None where it does not say."""
    try:
        config = row["config"]
        name = config if isinstance(config, str) else str(config["name"])
        rate = row.get("flops_per_second") or row["tokens_per_second"] * row.get("flops_per_token", cfg.flops_per_token)
        rate = float(rate) / int(row.get("world_size", 1))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return "", None
    return name, rate if 0 < rate < math.inf else None


def hours_from(cfg: Config, step: int, gpus: int) -> float | None:
    """Hours that a run at `step` has left on `gpus` GPUs; None where they cannot share its batch."""
    try:
        return predict(cfg, gpus).hours * (cfg.steps - step) / cfg.steps
    except UserError:
        return None


def summary(runs: list[tuple[Config, int]]) -> str:
    """What `runs` (with the step each is at) take together on 1, 2 and 8 GPUs, and at which rate and price, in two lines."""
    machines = [machine_for(cfg) for cfg, _ in runs]
    sources = [
        describe([m for m in machines if m.measured_on == name]) for name in dict.fromkeys(m.measured_on for m in machines)
    ]
    parts = []
    for gpus in (1, 2, 8):
        hours = [hours for cfg, step in runs if (hours := hours_from(cfg, step, gpus)) is not None]
        if len(hours) == len(runs):
            parts.append(
                f"{gpus} GPU{'s' if gpus > 1 else ''} {sum(hours):.1f} hours, ${sum(hours) * gpus * Machine.dollars:,.0f}"
            )
    return f"  at {', '.join(sources)}, and ${Machine.dollars:.2f} per GPU-hour\n  {'; '.join(parts)}"


def describe(machines: Sequence[Machine]) -> str:
    """Where the rates of machines with the same `measured_on` come from, in words."""
    rates, device = sorted({round(machine.flops / 1e12) for machine in machines}), machines[0].measured_on
    rate = f"{' to '.join(map(str, dict.fromkeys((rates[0], rates[-1]))))} TFLOP/s per GPU"
    if device:
        return f"{rate}, measured on {device}"
    return f"{rate}, assumed ({100 * machines[0].flops / H100_FLOPS:.0f} % of an H100's {H100_FLOPS / 1e12})"


def render(predictions: list[Prediction]) -> str:
    """A Markdown table, a row per number of GPUs."""
    head = ["GPUs", "nodes", "micro-batch × accumulation", "compute", "exchange", "not hidden", "optimizer", "step", "tokens/s"]
    rows = []
    for p in predictions:
        times = [f"{1e3 * t:.2f}" for t in (p.compute, p.exchange, p.exposed, p.optimizer, p.step)]
        run = [
            f"{p.tokens_per_second / 1e6:.2f}M",
            f"{p.efficiency:.1%}",
            f"{p.memory / 1e9:.1f} GB",
            f"{p.hours:.2f}",
            f"${p.dollars:,.1f}",
        ]
        rows.append([p.gpus, p.nodes, f"{p.micro_batch} × {p.grad_accum}", *times, *run])
    return table([*head, "efficiency", "memory", "hours", "cost"], rows)
