"""docs/performance.md: its tables, from results/bench-*.json and results/gpu-bench*.json."""

import json
from collections.abc import Callable
from typing import Any

from core.files import ROOT
from core.tables import table

Value = Callable[[dict[str, Any]], str]


def result(name: str) -> dict[str, Any]:
    """What lab.bench wrote to results/bench-NAME.json, or, as the stage "speed" of lab.bench.gpu, to results/gpu-NAME.json."""
    found = json.loads((ROOT / f"results/{file_of(name)}").read_text())
    return found["stages"]["speed"] if name.startswith("gpu") else found


def file_of(name: str) -> str:
    """The file of a result."""
    return f"{name if name.startswith('gpu') else f'bench-{name}'}.json"


def peer(found: dict[str, Any], name: str) -> float:
    """How many times as fast as the peer of this name the baseline is."""
    return next(one["ours_over_theirs"] for one in found["peers"] if one["peer"].startswith(name))


def candidate(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The result of one candidate, which an early file calls by its encoding."""
    return next(one for one in found["results"] if one.get("candidate", one["encoding"]) == name)


def of_rope(found: dict[str, Any], option: str) -> str:
    """Tokens/s of CARoPE and carope_hidden over RoPE's."""
    return " and ".join(f"{candidate(found, f'{name}{option}')['vs_baseline']:.3f}" for name in ("carope", "carope_hidden"))


def rate_and_share(one: dict[str, Any]) -> str:
    """Tokens/s, and the share of the matmul rate."""
    return f"{one['tokens_per_second']:,.0f}, {one['mfu_measured']:.1%}"


TINY = ",config/tiny.toml"
# what, target, results/bench-….json or results/gpu-….json, value
TARGETS: list[tuple[str, str, str, Value]] = [
    (
        "GPT-Small, T = 512, one H200, bf16, RoPE: tokens/s, of the matmul rate", "≥ 500k, ≥ 50 %", "gpu-bench",
        lambda r: rate_and_share(candidate(r, "rope")),
    ),
    (
        "GPT-Tiny likewise", "≥ 1.3M", "gpu-bench", lambda r: rate_and_share(candidate(r, f"rope{TINY}")),
    ),
    ("CARoPE ÷ RoPE there, `carope` and `carope_hidden`", "≥ 0.98 and ≥ 0.95", "gpu-bench", lambda r: of_rope(r, "")),
    ("the same, GPT-Tiny", "≥ 0.98 and ≥ 0.95", "gpu-bench", lambda r: of_rope(r, TINY)),
    (
        "RoPE ÷ nanoGPT as it ships (learned positions, no biases), GPT-Small and GPT-Tiny", "≥ 1.25", "gpu-bench",
        lambda r: f"{peer(r, 'nanoGPT, '):.3f} and {peer(r, f'nanoGPT{TINY}'):.3f}",
    ),
    (
        "peak memory of GPT-Small, 32 × 512 and 64 × 512, GB", "≤ 24 and ≤ 40", "gpu-bench",
        lambda r: " and ".join(f"{candidate(r, n)['peak_memory_bytes'] / 1e9:.1f}" for n in ("rope", "rope,micro_batch=64")),
    ),
    (
        "GPT-Tiny 4 × 512 in bf16 on two cores, share of the matmul rate", "≥ 70 %", "train-cpu",
        lambda r: f"{r['mfu_measured']:.1%}",
    ),
    ("the same ÷ nanoGPT as it ships (fp32, not compiled)", "≥ 2.2", "train-cpu", lambda r: f"{peer(r, 'nanoGPT'):.2f}"),
    ("the same ÷ build-nanogpt as it ships", "–", "train-cpu", lambda r: f"{peer(r, 'build-nanogpt'):.2f}"),
    (
        "CARoPE ÷ RoPE on two cores, `carope` and `carope_hidden`", "–", "train-cpu",
        lambda r: of_rope(r, ""),
    ),
    (
        "whole step ÷ forward, backward, optimizer alone: RoPE, and the other four encodings", "≤ 1.03", "train-cpu",
        lambda r: f"{r['whole_over_bare']:.3f}, " + ", ".join(f"{one['whole_over_bare']:.3f}" for one in r["results"][1:]),
    ),
    ("the same, RoPE alone, 50 rounds instead of 20", "≤ 1.03", "whole-cpu", lambda r: f"{r['whole_over_bare']:.3f}"),
    ("loader alone, a rank, 64 × 512", "≥ 50M tokens/s", "data-cpu", lambda r: f"{r['tokens_per_second'] / 1e6:.0f}M"),
    (
        "memory of the loader over an epoch", "no growth", "data-cpu",
        lambda r: f"{r['anonymous_growth_bytes'] / 1e6:.1f} MB",
    ),
    (
        "`prepare_fineweb.py` ÷ `encode_ordinary` alone, one worker", "≥ 1.0", "prepare-cpu",
        lambda r: f"{r['candidates']['ours-1']['ratio']:.2f}",
    ),
    (
        "the same, two workers on two cores", "≥ 1.8", "prepare-cpu", lambda r: f"{r['candidates']['ours-2']['ratio']:.2f}",
    ),
    (
        "`prepare_fineweb.py` ÷ build-nanogpt's recipe, a pool of processes: one, two", "≥ 1.0", "prepare-cpu",
        lambda r: " and ".join(f"{r['ours_over_pool'][n]:.2f}" for n in ("1", "2")),
    ),
    (
        "two processes with `encode_ordinary` and nothing else, ÷ one: what two workers could reach", "–", "prepare-cpu",
        lambda r: f"{r['candidates']['apart-2']['ratio']:.2f}",
    ),
    (
        "decoding, a token at position 1000 ÷ at position 50", "≤ 1.5", "decode-cpu",
        lambda r: f"{r['encodings'][0]['late_over_early']:.2f}",
    ),
    (
        "decoding 512 tokens with the cache ÷ without, head at the last position and at all", "≥ 8", "decode-cpu",
        lambda r: f"{r['encodings'][0]['cache_speedup']:.1f} and {r['encodings'][0]['cache_speedup_all_logits']:.1f}",
    ),
    (
        "decoding, tokens/s of eight prompts ÷ of one", "≥ 4", "decode-cpu",
        lambda r: f"{r['encodings'][0]['batch_speedup']:.2f}",
    ),
    (
        "decoding in bf16 ÷ in fp32, tokens/s of one prompt (not of one run)", "–", "decode-bf16-cpu",
        lambda r: f"{r['tokens_per_second'] / result('decode-cpu')['tokens_per_second']:.2f}",
    ),
    ("evaluation ÷ training, tokens/s", "≥ 2.8", "eval-cpu", lambda r: f"{r['eval_over_train']:.2f}"),
    (
        "`train.py` to its first step, GPT-Tiny 4 × 512", "≤ 10 s", "startup-cpu",
        lambda r: f"{r['seconds']['first step']['median']:.1f} s",
    ),
    (
        "`--help`, the slowest of the scripts", "≤ 1 s", "startup-cpu",
        lambda r: f"{max(s['median'] for name, s in r['seconds'].items() if name != 'first step'):.2f} s",
    ),
]  # fmt: skip


TIMED = ["ms", "p10", "p90", "tokens/s", "of the matmul rate"]


def render_targets() -> str:
    """A row per target: what, target, measured, file."""
    rows = [[what, target, value(result(name)), f"`results/{file_of(name)}`"] for what, target, name, value in TARGETS]
    return table(["what", "target", "measured", "file"], rows)


def timing(one: dict[str, Any], name: str | None, digits: int) -> list[str]:
    """The cells of a candidate of this name, or of a peer: milliseconds with `digits` decimals, tokens/s, share of matmul."""
    share = f"{one['mfu_measured']:.1%}" if "mfu_measured" in one else "–"
    spread = [f"{one[key]:,.{digits}f}" for key in ("ms_median", "ms_p10", "ms_p90")]
    return [name or one["peer"], *spread, f"{one['tokens_per_second']:,.0f}", share]


def render_training() -> str:
    """A row per encoding and peer of results/bench-train-cpu.json."""
    found = result("train-cpu")
    rows = [timing(one, one.get("encoding"), 0) for one in [*found["results"], *found["peers"]]]
    return f"{table(['', *TIMED], rows)}\n{source(found)}\n"


def render_rotary() -> str:
    """A row per encoding of results/bench-rotary-cpu.json: the step beside RoPE's, and the process's peak memory."""
    found = result("rotary-cpu")
    rows = [
        [*timing(one, one["candidate"], 0)[:5], f"{one['vs_baseline']:.2f}", f"{one['peak_memory_bytes'] / 1e9:.2f}"]
        for one in found["results"]
    ]
    return f"{table(['', *TIMED[:4], '÷ rope', 'GB'], rows)}\n{source(found)}\n"


def render_gpu() -> str:
    """A table for each GPU: a row per candidate and peer, as they were timed together."""
    parts = []
    for name in ("gpu-bench-h100", "gpu-bench"):
        found = result(name)
        every = [*found["results"], *found["peers"]]
        rows = [[*timing(one, one.get("candidate"), 1), f"{one['peak_memory_bytes'] / 1e9:.1f}"] for one in every]
        parts.append(f"{table([found['device'], *TIMED, 'GB'], rows)}\n{source(found)}\n")
    return "\n".join(parts)


def source(found: dict[str, Any]) -> str:
    """Command, machine, commit and n of a result."""
    machine = f"{found['device']}, {found['threads']} threads, torch {found['torch']}"
    n, matmul = found["n"], found["matmul_tflops"]
    return f"`{found['command']}`, {machine}, commit {found['git'][:7]}, n = {n}, matmul {matmul:.3f} TFLOP/s."


def blocks() -> dict[str, str]:
    """Text for each marker of the page."""
    return {"targets": render_targets(), "gpu": render_gpu(), "training": render_training(), "rotary": render_rotary()}
