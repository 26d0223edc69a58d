"""What of a GPU's work can be seen without one: devices, and that the code Inductor writes for an H100 compiles."""

import json

import pytest
import torch
from conftest import run_command

from positional import ENCODINGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__ != "2.13.0+cpu", reason="stands on private parts of this torch"),
]


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
