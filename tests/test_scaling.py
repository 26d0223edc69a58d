"""core/sweep/scaling.py: a model held to hand-computed values and limits; lab.bench overlap: what it reads out of a trace."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, run_command, torchrun

from core.config import Config, load_config
from core.errors import UserError
from core.sweep.scaling import (
    ADAMW_BYTES,
    CHECKPOINT_BYTES,
    EVALUATION_SET,
    H100_FLOPS,
    Machine,
    all_reduce,
    ddp_buckets,
    evaluation,
    hours_from,
    machine_for,
    memory,
    n_params,
    predict,
    split,
    summary,
)
from lab.bench.__main__ import parse_args
from lab.bench.overlap import analyze, union
from model import GPT
from positional import ENCODINGS

SMALL = load_config([str(ROOT / "config/small.toml")])
TINY = load_config([str(ROOT / "config/tiny.toml")])
NO_LATENCY = {"nvlink_latency": 0.0, "network_latency": 0.0}
ROUND = Machine(flops=1e14, nvlink=1e11, network=1e10, efficiency=1.0, hbm=1e12, disk=1e9, dollars=2.0, **NO_LATENCY)
GPUS = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_parameters_are_the_models_but_for_the_encodings_own(size, encoding):
    cfg = load_config([str(ROOT / f"config/{size}.toml"), f"--encoding={encoding}"])
    with torch.device("meta"):
        counts = GPT(cfg).n_params()
    assert n_params(cfg) == counts["total"] - counts["encoding"]
    assert counts["encoding"] <= 0.011 * counts["total"]


def test_one_gpu_exchanges_nothing_and_computes_at_its_rate():
    one = predict(SMALL, 1, ROUND)
    assert (one.exchanged, one.exchange, one.exposed, one.efficiency) == (0, 0, 0, 1)
    assert one.compute == pytest.approx(524_288 * 798_031_872 / 1e14) and SMALL.flops_per_token == 798_031_872
    assert one.optimizer == pytest.approx(10 * 4 * 123_689_472 / 1e12)
    assert one.step == one.compute + one.optimizer
    assert ADAMW_BYTES == 40


def test_bytes_and_seconds_of_an_exchange_by_hand():
    assert predict(SMALL, 8, ROUND).exchanged == pytest.approx(2 * 7 / 8 * 4 * 123_689_472)
    assert all_reduce(80e6, 1, ROUND) == 0
    assert all_reduce(80e6, 8, ROUND) == pytest.approx(2 * 7 / 8 * 80e6 / 1e11)  # 1.4 ms
    # four nodes of eight: within each as above, then each GPU's eighth around a ring of four
    assert all_reduce(80e6, 32, ROUND) == pytest.approx(1.4e-3 + 2 * 3 / 4 * 10e6 / 1e10)
    slow = replace(ROUND, efficiency=0.5, nvlink_latency=1e-6, network_latency=1e-5)
    assert all_reduce(80e6, 32, slow) == pytest.approx(2 * (1.4e-3 + 1.5e-3) + 2 * 7 * 1e-6 + 2 * 3 * 1e-5)


def test_what_backward_cannot_hide_is_the_last_bucket_and_the_excess():
    fast, slow = predict(SMALL, 8, ROUND), predict(SMALL, 8, replace(ROUND, nvlink=1e8))
    *early, last = ddp_buckets(SMALL)
    assert last >= 4 * SMALL.vocab_size * SMALL.n_embd  # the embedding is the head: its gradient is whole at the end
    assert fast.exposed == pytest.approx(1.75 * last / 1e11) and fast.exchange > fast.exposed
    backward = slow.compute / 4 * 2 / 3  # of the last of four micro-steps
    assert slow.exposed == pytest.approx(1.75 * (sum(early) + last) / 1e8 - backward)


def test_fsdp_by_hand():
    """Of two blocks: what is sent, and what is not hidden on links so slow that nothing hides it and so fast that all does."""
    words = [
        "--n_layer=2",
        "--n_embd=64",
        "--n_head=1",
        "--vocab_size=1000",
        "--micro_batch=2",
        "--block_size=8",
        "--parallel=fsdp",
    ]
    cfg = load_config([*words, "--tokens_per_step=192"])  # three micro-steps on each of four GPUs
    rest, block = 4 * (1002 * 64), 4 * (12 * 64**2 + 13 * 64)
    assert rest + 2 * block == 4 * n_params(cfg)
    slow, fast = (predict(cfg, 4, replace(ROUND, nvlink=rate, flops=1e20 if rate < 1e9 else 1e12)) for rate in (1e6, 1e15))
    assert slow.exchanged == pytest.approx(3 / 4 * (3 * (rest + 2 * 2 * block) + rest + 2 * block))
    assert slow.exchange == pytest.approx(slow.exchanged / 1e6) and slow.exposed == pytest.approx(slow.exchange)
    unhidden = 3 * (rest + 2 * block) + block + rest
    assert fast.exposed == pytest.approx(3 / 4 * unhidden / 1e15) and fast.exposed < fast.exchange
    assert fast.optimizer == pytest.approx(ADAMW_BYTES * n_params(cfg) / 4 / 1e12) and predict(cfg, 1, ROUND).exposed == 0
    assert predict(cfg, 4, replace(ROUND, nvlink=math.inf)).efficiency == 1


def test_recomputation_takes_the_blocks_forward_pass_once_more_and_keeps_their_inputs():
    again = SMALL.model_copy(update={"activation_checkpointing": True})
    blocks = 2 * (12 * 12 * 768**2) + 4 * 12 * 768 * 512  # FLOPs of a token, forward
    more = predict(again, 1, ROUND).compute - predict(SMALL, 1, ROUND).compute
    assert more == pytest.approx(524_288 * blocks / 1e14)
    saved = predict(SMALL, 1, ROUND).memory - predict(again, 1, ROUND).memory
    assert saved == pytest.approx(32 * 512 * 768 * (12 * 40 - 12 * 4 - 40))


def test_memory_is_near_what_a_gpu_took():
    rows = json.loads((ROOT / "results/gpu-bench.json").read_text())["stages"]["speed"]["results"]
    configs = [Config(**row["config"]) for row in rows]
    ratios = [memory(cfg, 1, cfg.micro_batch, 2) / row["peak_memory_bytes"] for cfg, row in zip(configs, rows, strict=True)]
    assert len(ratios) > 5 and min(ratios) > 0.9 and max(ratios) < 1.2


def test_memory_of_a_share():
    cfg = SMALL.model_copy(update={"parallel": "fsdp"})
    P, rest, block = n_params(SMALL), 4 * 50306 * 768, 4 * (12 * 768**2 + 13 * 768)
    tokens = 32 * 512 * (12 * 40 * 768 + 2 * 50304)
    assert predict(cfg, 8, ROUND).memory == pytest.approx(12 * P / 8 + 4 * P + rest + 2 * block + tokens)  # four micro-steps
    assert predict(cfg, 32, ROUND).memory == pytest.approx(16 * P / 32 + rest + 2 * block + tokens)  # one
    assert predict(cfg, 1, ROUND).memory == predict(SMALL, 8, ROUND).memory == pytest.approx(18 * P + tokens)


@pytest.mark.parametrize("gpus", GPUS)
def test_with_infinite_bandwidth_nothing_is_lost(gpus):
    ideal = replace(ROUND, nvlink=math.inf, network=math.inf, hbm=math.inf)
    assert predict(SMALL, gpus, ideal).efficiency == 1
    assert predict(SMALL, gpus, ideal).step == pytest.approx(predict(SMALL, 1, ideal).step / gpus)


@pytest.mark.parametrize("cfg", [TINY, SMALL], ids=["tiny", "small"])
def test_more_gpus_take_less_time_and_lose_more_of_it(cfg):
    predictions = [predict(cfg, gpus) for gpus in GPUS]
    for fewer, more in pairwise(predictions):
        assert more.hours < fewer.hours and more.efficiency < fewer.efficiency and more.dollars > fewer.dollars
        assert more.tokens_per_second == pytest.approx(524_288 / more.step)


def test_the_micro_batch_shrinks_where_there_is_none_left_for_each():
    assert [split(SMALL, gpus) for gpus in (1, 8, 32, 64)] == [(32, 32), (32, 4), (32, 1), (16, 1)]
    assert split(SMALL.model_copy(update={"tokens_per_step": 60 * 512}), 2) == (30, 1)


def test_hours_count_steps_validations_and_checkpoints():
    cfg = SMALL.model_copy(update={"steps": 10, "eval_every": 4, "save_every": 3, "eval_tokens": 3 * 32 * 512})
    cfg = cfg.model_copy(update={"final_eval_tokens": 5 * 32 * 512})
    batch = 32 * 512 * cfg.flops_per_token / 3 / 1e14  # a forward pass is a third
    found = predict(cfg, 2, ROUND)
    assert found.evaluation == pytest.approx(batch * (3 * 2 + 3))  # steps 0, 4, 8: two rounds on two GPUs; the last one: three
    assert found.checkpoints == pytest.approx(4 * CHECKPOINT_BYTES * n_params(cfg) / 1e9)  # steps 3, 6, 9, 10
    assert found.hours == pytest.approx((10 * found.step + found.evaluation + found.checkpoints) / 3600)
    assert found.dollars == pytest.approx(found.hours * 2 * 2.0)
    whole = evaluation(cfg.model_copy(update={"final_eval_tokens": 0}), 1, 32, ROUND)
    assert whole == pytest.approx(batch * (3 * 3 + math.ceil(EVALUATION_SET / (32 * 512))))


def test_what_is_left_of_a_run_and_what_cannot_be_split():
    assert hours_from(SMALL, 9500, 2) == pytest.approx(hours_from(SMALL, 0, 2) / 2)
    odd = TINY.model_copy(update={"tokens_per_step": 3 * 512})
    assert hours_from(odd, 0, 2) is None and hours_from(odd, 0, 1) > 0
    assert "1 GPU " in summary([(odd, 0), (TINY, 0)]) and "2 GPUs" not in summary([(odd, 0), (TINY, 0)])


def test_the_assumed_rate_is_40_percent_of_the_peak_that_mfu_counts_from():
    from core.distributed import PEAK_TFLOPS

    assert PEAK_TFLOPS["H100"] * 1e12 == H100_FLOPS and Machine().flops == 0.4 * H100_FLOPS


@pytest.mark.parametrize(
    ("rows", "flops"),
    [
        ([{"config": "small-carope", "flops_per_second": 3e14}], 3e14),
        ([{"config": {"name": "small-carope"}, "flops_per_second": 3e14}], 3e14),
        ([{"config": "small-carope", "tokens_per_second": 1000, "flops_per_token": 2000}], 2e6),
        ([{"config": "small-carope", "tokens_per_second": 1000}], 1000 * SMALL.flops_per_token),
        ([{"config": "small-carope", "flops_per_second": 8e14, "world_size": 2}], 4e14),
        # its own rate before another encoding's, another encoding's before another size's
        ([{"config": "small-rope", "flops_per_second": 5e14}, {"config": "small-carope", "flops_per_second": 3e14}], 3e14),
        ([{"config": "small-rope", "flops_per_second": 5e14}, {"config": "tiny-carope", "flops_per_second": 3e14}], 5e14),
        ([{"config": "tiny-carope", "flops_per_second": 3e14}], None),
        ([{"config": "small-carope", "flops_per_second": math.inf}, {"config": "small-carope"}, 7, None, {}], None),
        ("no list", None),
    ],
)
def test_measured_rates_take_the_place_of_the_assumed_one(rows, flops, tmp_path):
    path = tmp_path / "gpu-bench.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "results": rows}))
    machine = machine_for(SMALL.model_copy(update={"name": "small-carope"}), path=path)
    assert (machine.flops, machine.measured_on) == ((flops, "NVIDIA H100 80GB HBM3") if flops else (Machine.flops, ""))


@pytest.mark.parametrize("text", [None, "", "[1]", "{}", '{"results": {}}', "\x00"])
def test_no_file_or_another_one_leaves_the_assumption(text, tmp_path):
    path = tmp_path / "gpu-bench.json"
    if text is not None:
        path.write_text(text)
    assert machine_for(SMALL, path=path) == Machine()


def test_bench_scaling_prints_the_table_and_the_same_as_json(tmp_path):
    done = run_command(
        "lab.bench", "scaling", "config/small.toml", "--gpus", 1, 8, 16, "--tflops", 100, "--json", tmp_path / "x"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "x").read_text())
    assert [(p["gpus"], p["nodes"]) for p in found["predictions"]] == [(1, 1), (8, 1), (16, 2)]
    for p in found["predictions"]:
        assert p["compute"] == pytest.approx(524_288 * 798_031_872 / 100e12 / p["gpus"])
        assert f"| {1e3 * p['step']:.2f} | {p['tokens_per_second'] / 1e6:.2f}M | {p['efficiency']:.1%} |" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scaling", "config/small.toml", "--gpus", "4096"], "gpus = 4096: must divide the 1024 sequences"),
        (["scaling", "config/small.toml", "--gpus", "12"], "gpus = 12: must be 1 to 8, or a multiple of the 8"),
        (["scaling", "config/small.toml", "--gpus", "0"], "gpus = 0: must be 1 to 8"),
        (["scaling", "config/small.toml", "--efficiency", "0"], "--efficiency = 0.0: must be more than 0"),
        (["scaling", "config/small.toml", "--stepz=3"], "did you mean --steps"),
        (["overlap", "config/demo.toml"], "needs two ranks or more; torchrun"),
        (["overlap", "config/demo.toml", "--bucket_mb", "0"], "--bucket_mb = 0.0: must be more than 0"),
    ],
)
def test_refusals(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, rest = parse_args(words)
    with pytest.raises(UserError, match=re.escape(message)):
        args.module.run(args, rest)


def test_a_refusal_is_one_line():
    done = run_command("lab.bench", "scaling", "config/small.toml", "--gpus", "3")
    assert done.returncode == 2 and done.stderr.startswith("error: gpus = 3") and done.stderr.count("\n") == 1


def span(name: str, start: float, end: float, cat: str = "cpu_op") -> dict:
    """An event of a Chrome trace; milliseconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start)}


def test_a_trace_of_a_cpu_by_hand():
    """Two buckets: the first hidden but for a gap, the second, 20 to 26, begun 2 ms before the end of backward at 22."""
    function = "autograd::engine::evaluate_function: "
    events = [
        span("step: forward", 0, 10, "user_annotation"),
        span("step: last backward", 10, 27, "user_annotation"),
        span("step: optimizer", 27, 30, "user_annotation"),
        span(function + "MmBackward0", 11, 16),
        span(function + "AccumulateGrad", 18, 22),
        span("aten::mm", 11, 26.5),
        span("gloo:all_reduce", 14, 17, "user_annotation"),
        span("gloo:all_reduce", 20, 26, "user_annotation"),
        span("gloo:all_reduce", 28, 29, "user_annotation"),  # not of the backward
        {"ph": "M", "name": "process_name"},
    ]
    found = analyze(events)
    assert found == {
        "backward_ms": 11, "exchange_ms": 9, "overlapped_ms": 5, "exposed_ms": 4, "overlap": round(5 / 9, 4),
        "step_forward_ms": 10, "step_backward_ms": 17, "step_optimizer_ms": 3,
    }  # fmt: skip


def test_a_trace_of_a_gpu_counts_kernels():
    """What the host did (autograd's functions) is not when the GPU did it."""
    events = [
        span("step: last backward", 0, 20, "user_annotation"),
        span("step: last backward", 0, 20, "gpu_user_annotation"),
        span("autograd::engine::evaluate_function: MmBackward0", 0, 1),
        span("sm90_gemm", 2, 10, "kernel"),
        span("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 8, 14, "kernel"),
        span("nccl:all_reduce", 0, 20, "gpu_user_annotation"),
    ]
    found = analyze(events)
    assert [found[f"{name}_ms"] for name in ("backward", "exchange", "overlapped", "exposed")] == [8, 6, 2, 4]


def test_intervals_unite():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


@pytest.mark.slow
def test_the_exchange_of_two_ranks_is_seen_and_its_buckets_are_the_models():
    """One bucket leaves nothing to hide it behind; small ones begin while backward goes on."""
    model = ["--n_layer=4", "--n_embd=128", "--micro_batch=4", "--tokens_per_step=1024", "--device=cpu"]
    words = ["--bucket_mb", "0.25", "100", "--rounds", "2", "--traced", "2"]
    done = torchrun(2, "lab.bench", "overlap", "config/demo.toml", *model, *words)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and done.stdout.endswith(lines[0] + "\n")  # rank 0 alone prints
    found = json.loads(lines[0])
    assert (found["world_size"], found["backend"], found["no_exchange"]["n"]) == (2, "gloo", 2)
    own, small, one = found["results"]
    for r in found["results"]:
        assert r["bucket_bytes"] == r["predicted_bucket_bytes"] and r["sent_bytes"] == sum(r["bucket_bytes"]) == 3_337_216
        for rank in r["ranks"]:
            assert 0 <= rank["overlapped_ms"] <= rank["exchange_ms"] and 0 <= rank["exposed_ms"] <= rank["exchange_ms"]
            assert rank["exchange_ms"] > 0 and 0 < rank["backward_ms"] < rank["step_backward_ms"]
    assert [len(r["bucket_bytes"]) for r in (own, one)] == [2, 1] and len(small["bucket_bytes"]) > 5
    assert len(own["ranks"]) == 2
    assert min(rank["overlap"] for rank in small["ranks"]) > max(rank["overlap"] for rank in one["ranks"])
