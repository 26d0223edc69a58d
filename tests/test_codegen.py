"""Code for an H100 that is not there: what lab.bench.codegen counts, and what of a GPU's work can be seen without one."""

import json
from collections.abc import Callable

import pytest
import torch
from conftest import run_command

from positional import ENCODINGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__ != "2.13.0+cpu", reason="stands on private parts of this torch"),
]
WORDS = ["config/small.toml", "--n_layer=2", "--kernel=eager", "--encodings", "rope", "alibi", "cable"]
TOKENS, V, C = 32 * 512, 50304, 768


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Callable[[str], dict]:
    """By encoding, what the command wrote."""
    path = tmp_path_factory.mktemp("codegen") / "found.json"
    done = run_command("lab.bench.codegen", *WORDS, "--json", path, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["estimated"] and all(f"{one['tokens_per_second']:,}" in done.stdout for one in found["results"])
    return {one["encoding"]: one for one in found["results"]}.__getitem__


@pytest.mark.parametrize("encoding", ["rope", "alibi", "cable"])
def test_flops_are_the_models_and_the_loss_reads_and_writes_its_logits_once(counted, encoding):
    parts = counted(encoding)["parts"]
    assert parts["matmuls"]["tflop"] == pytest.approx(6 * TOKENS * (12 * 2 * C**2 + V * C) / 1e12, rel=0.01)
    assert parts["attention"]["tflop"] == pytest.approx(7 * 2 * TOKENS * 512 * C / 1e12, abs=1e-3)
    logits = 2 * TOKENS * V / 1e9
    assert 2 * logits < parts["loss"]["gb"] < 2 * logits + 1  # besides, gradients of weights and embeddings


def test_the_compilers_rotation_moves_q_k_and_their_gradients_and_nothing_else(counted):
    """Forward q and k in and out; backward their gradients in and out and v's copied beside them; with some slack."""
    unit = 2 * TOKENS * C / 1e9  # q of one layer, in bf16
    assert 10 * 2 * unit <= counted("rope")["parts"]["positions"]["gb"] < 11.2 * 2 * unit


def fake_gpu(*words: str) -> dict[str, list[str]]:
    done = run_command("-m", "tests.fake_gpu", *words, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def stepped() -> dict[str, list[str]]:
    return fake_gpu("eager", *ENCODINGS)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_on_a_gpu_nothing_is_made_on_the_cpu_and_decoding_keeps_off_cudnn(stepped, encoding):
    assert not stepped[encoding]


# Of encodings that compute alike, one
COMPILED = [
    "rope", "rope,kernel=triton", "xpos", "partial_rope", "comrope", "carope", "carope_hidden,kernel=triton", "seqpe", "t5",
    "fire", "cable", "cope", "urpe", "path",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    return fake_gpu("bfloat16", *COMPILED)


@pytest.mark.parametrize("name", COMPILED)
def test_a_micro_step_compiles_for_an_h100_and_its_kernels_fit_into_registers(compiled, name):
    assert not compiled[name]
