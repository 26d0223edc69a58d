"""cluster/table1.sbatch, with stand-ins for Slurm's commands, and two torchrun agents that meet as two nodes do."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Hold, ends_with_the_test, wait_until

from core.checkpoint import newest_checkpoint
from core.errors import EXIT_LOST_RANK, EXIT_REQUEUE

SCRIPT = ROOT / "cluster/table1.sbatch"
# Runs the command once per node and hands signals on to all, as srun does
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
options = [word for i, word in enumerate(words) if word.startswith("--") and all(w.startswith("--") for w in words[:i])]
nodes = 1 if "--nodes=1" in options else int(os.environ["SLURM_NNODES"])
children = []
signal.signal(signal.SIGUSR1, lambda number, frame: [child.send_signal(number) for child in children])
children += [subprocess.Popen(words[len(options):]) for _ in range(nodes)]
sys.exit(max(child.wait() for child in children))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" = show ] && echo 127.0.0.1 && echo second-node
exit 0
"""


def slurm(folder: Path, srun: str, **env: str) -> dict[str, str]:
    """The environment of a job on two nodes whose srun and scontrol are stand-ins; scontrol notes its calls."""
    bin_ = folder / "bin"
    bin_.mkdir()
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    with socket.socket() as probe:  # the script's port is 29500 + the job's number modulo 1000
        job = next(n for n in range(os.getpid() % 900, 1000) if probe.connect_ex(("127.0.0.1", 29500 + n)))
    of_slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    of_slurm["SLURM_CPUS_PER_TASK"] = "4"
    path = {"PATH": f"{bin_}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "PYTHON": sys.executable}
    return os.environ | of_slurm | path | env


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def sbatch(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_script_is_bash_and_its_header_slurms():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    header = re.findall(r"^#SBATCH (--\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--nodes=2", "--signal=B:TERM@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(header)
    body = SCRIPT.read_text()
    assert f"REQUEUE={EXIT_REQUEUE} " in body and f"LOST_RANK={EXIT_LOST_RANK} " in body


@pytest.mark.parametrize(
    ("code", "restarts", "queued"), [(75, 0, True), (71, 3, True), (75, 50, False), (2, 0, False), (0, 0, False)]
)
def test_what_the_exit_code_of_a_step_leads_to(corpus, tmp_path, code, restarts, queued):
    echo = f'#!/bin/sh\necho "$@" >> "$CALLS.srun"\nexit {code}\n'
    env = slurm(tmp_path, echo, DATA=str(corpus), SIZES="tiny", ENCODINGS="rope carope", SLURM_RESTART_COUNT=str(restarts))
    done = sbatch(env, "--seed=2")
    assert done.returncode == code, done.stderr
    assert (f"requeue {env['SLURM_JOB_ID']}" in calls(tmp_path)) == queued
    steps = (tmp_path / "calls.srun").read_text().splitlines()
    assert len(steps) == (3 if code == 0 else 1), "two runs and the table, or none after the first that failed"
    assert "config/tiny.toml config/rope.toml" in steps[0] and "--nnodes=2" in steps[0] and steps[0].endswith("--seed=2")
    assert steps[0].startswith("--cpus-per-task=4 ")
    assert code or "table1.py --nproc 1 --sizes tiny --encodings rope carope --lengths 512 1024" in steps[-1]


def test_a_signal_that_comes_before_python_is_ready_queues_again(corpus, tmp_path):
    """srun ends as a process does that a signal kills."""
    srun = '#!/bin/sh\ntrap "exit 138" USR1\necho >> "$CALLS.srun"\nwhile :; do sleep 0.05; done\n'
    env = slurm(tmp_path, srun, DATA=str(corpus))
    job = ends_with_the_test(subprocess.Popen(["bash", SCRIPT], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    wait_until(job, (tmp_path / "calls.srun").exists)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate()
    assert job.returncode == EXIT_REQUEUE and calls(tmp_path)[-1] == f"requeue {env['SLURM_JOB_ID']}", err


def test_without_data_it_says_how_to_get_it(tmp_path):
    done = sbatch(slurm(tmp_path, "", DATA=str(tmp_path / "no")))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "prepare_fineweb.py --pretokenized" in done.stderr


@pytest.mark.slow
def test_a_job_on_two_nodes_is_preempted_queued_again_and_makes_the_table(small, corpus, tmp_path):
    """Two agents meet by c10d on loopback, which is what two nodes do; a signal to the job's shell saves on both."""
    env = slurm(tmp_path, f"#!{sys.executable}\n{SRUN}", DATA=str(corpus), OUT_DIR=str(tmp_path))
    env |= {"SIZES": "tiny", "ENCODINGS": "rope", "LENGTHS": "32 64"}
    toy = [
        word for word in small if not word.startswith(("--data", "--out_dir", "--steps", "--warmup", "--save", "--eval_every"))
    ]
    words = [*toy, "--steps=30", "--eval_every=30", "--save_every=30"]
    command, hold = ["bash", SCRIPT, *words], Hold(tmp_path, "core.optim:set_lr", 8)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = ends_with_the_test(subprocess.Popen(command, cwd=ROOT, env=env | hold.env, **pipes))
    run = tmp_path / "tiny-rope"
    hold.reached(job)
    job.send_signal(signal.SIGTERM)
    hold.release()
    out, err = job.communicate()
    assert job.returncode == EXIT_REQUEUE and "queued again" in out, err
    assert f"requeue {env['SLURM_JOB_ID']}" in calls(tmp_path)
    saved = newest_checkpoint(run)[1].step
    assert saved == 8

    done = sbatch(env | {"SLURM_RESTART_COUNT": "1"}, *words)
    assert done.returncode == 0, done.stderr
    assert newest_checkpoint(run)[1].step == 30
    assert "| 64 | ours |" in (tmp_path / "table1.md").read_text()


def test_the_image_leaves_out_what_git_does_and_is_pinned():
    ignored = set((ROOT / ".dockerignore").read_text().split("\n"))
    assert {".git", ".venv", "data", "runs", "wandb"} <= ignored
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+-\S+$", dockerfile, re.MULTILINE) and "\nUSER 1000\n" in dockerfile
    assert 'CMD ["train.py", "--help"]' in dockerfile


def test_the_task_of_skypilot_is_yaml_and_its_commands_bash():
    task = yaml.safe_load((ROOT / "cluster/table1.sky.yaml").read_text())
    assert task["resources"]["accelerators"] == "H100:2"
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
