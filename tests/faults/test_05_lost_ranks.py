"""A rank that dies or hangs: the others leave within the timeout, the rank is named, torchrun starts them again."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run, ends_with_the_test, run_command, torchrun
from torch.distributed import TCPStore

from core.checkpoint import newest_checkpoint
from core.errors import EXIT_LOST_RANK

INJECT = Path(__file__).with_name("inject.py")
WORDS = ["--encoding=carope", "--save_every=2"]
PATIENCE_S = "6"  # --dist_timeout from the fault's step on: before, each rank may take its time to start


def inject(what: str, launcher: list[str], *args: object):
    env = {"INJECT": what, "INJECT_PATIENCE_S": PATIENCE_S}
    return run_command(*launcher, "--nproc_per_node=2", INJECT, *args, env=env)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_dies_is_named(fault, small, rank):
    happened = fault(f"SIGKILL of rank {rank} of two at step 5")
    begun = time.monotonic()
    done = inject(f"die {rank} 5", ["core.launch"], *small, *WORDS, "--name=r")
    assert done.returncode == 128 + 9, done.stderr
    assert f"error: local rank {rank} was killed by SIGKILL" in done.stderr
    happened("the launcher names the rank, ends the other and exits with 137", run_s=round(time.monotonic() - begun, 1))


@pytest.mark.slow
def test_a_rank_that_dies_unseen_by_a_launcher_is_named_by_the_others(fault, small, tmp_path):
    """As where the launcher went with its node: here nobody but the ranks themselves can notice."""
    happened = fault("SIGKILL of rank 1 of two at step 5, ranks started without a launcher")
    # The store is ours, as it is an agent's under torchrun: its port is chosen and taken in one
    ranks, store = [], TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(2):
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        env |= {"INJECT": "die 1 5"}
        command = [sys.executable, str(INJECT), *small, *WORDS, "--name=r"]
        pipes = {"stderr": subprocess.PIPE, "text": True}
        ranks.append(ends_with_the_test(subprocess.Popen(command, env=os.environ | env, cwd=INJECT.parents[2], **pipes)))
    _, stderr = ranks[0].communicate()
    ranks[1].communicate()
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert ranks[0].returncode == EXIT_LOST_RANK and "rank 1 is gone, last seen at " in line
    happened(f"rank 0 left with {EXIT_LOST_RANK}: {line[:90]}…")


# torchrun waits 30 s before it kills a stopped process
STOP = pytest.param("stop", marks=pytest.mark.slow)


@pytest.mark.parametrize("what", [pytest.param("sleep", marks=pytest.mark.slow), STOP])
def test_a_rank_that_hangs_is_named_within_the_timeout(fault, small, what):
    kind = {"sleep": "waits for ever for its data", "stop": "is stopped (SIGSTOP), as by a dying node"}[what]
    happened = fault(f"rank 1 of two {kind} at step 5, --dist_timeout={PATIENCE_S}")
    begun = time.monotonic()
    done = inject(f"{what} 1 5", ["core.launch"], *small, *WORDS, "--name=r")
    seconds = time.monotonic() - begun
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: rank"))
    verb = {"sleep": "hangs", "stop": "is gone"}[what]
    assert line.startswith(f"error: rank 1 {verb}, last seen at "), line
    assert f"no progress for {PATIENCE_S} s (--dist_timeout)" in line
    assert done.returncode == EXIT_LOST_RANK
    assert ("poisoned_read" in done.stderr) == (what == "sleep"), "a rank that can still speak shows where it hangs"
    happened(line[7:], run_s=round(seconds, 1))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die", "stop"])
def test_torchrun_starts_the_ranks_again_and_nothing_is_lost(fault, small, tmp_path, what):
    happened = fault({"die": "SIGKILL", "stop": "SIGSTOP"}[what] + " of rank 1 at step 5, torchrun --max-restarts=3")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    done = inject(f"{what} 1 5", torchrun, *small, *WORDS, "--name=r")
    assert done.returncode == 0, done.stderr
    whole = inject("nothing", ["core.launch"], *small, *WORDS, "--name=whole")
    assert whole.returncode == 0, whole.stderr
    assert_same_run(tmp_path / "r", tmp_path / "whole")
    happened("it went on from step 4 by itself; weights, optimizer and log equal an undisturbed run to the last bit")


REFUSED = """
import os, time
from core.errors import UserError, command

@command
def main():
    time.sleep(1 - int(os.environ["RANK"]))
    raise UserError("this is why")

main()
"""


def test_the_rank_that_says_why_may_be_the_slower_one(tmp_path):
    """torchrun ends all ranks as soon as one has ended."""
    (tmp_path / "refused.py").write_text(REFUSED)
    done = run_command("core.launch", "--nproc_per_node=2", tmp_path / "refused.py", env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (2, "error: this is why\n")


@pytest.mark.slow
def test_no_thread_is_left_in_the_store_when_python_ends(tmp_path):
    """It would end the process by SIGABRT (`terminate called without an active exception`) once in some hundred runs."""
    code = "import threading; from core.distributed import Distributed\nwith Distributed.start('cpu'): pass\n"
    code += "print([thread.name for thread in threading.enumerate()])"
    (tmp_path / "starts.py").write_text(code)
    done = torchrun(1, tmp_path / "starts.py", env={"PYTHONPATH": str(ROOT)}, real=True)
    assert done.returncode == 0 and "watchdog" not in done.stdout and "MainThread" in done.stdout, done.stderr


LATE = """
#include <cstring>
#include <dlfcn.h>
#include <sys/prctl.h>
#include <unistd.h>

extern "C" void _ZNSt18condition_variable10notify_allEv(void* self) {
  static const auto notify_all = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "_ZNSt18condition_variable10notify_allEv"));
  notify_all(self);
  char thread[16] = {};
  prctl(PR_GET_NAME, thread);
  if (std::strstr(thread, "gloo")) usleep(3000);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="holds up a thread by LD_PRELOAD")
def test_a_thread_of_gloos_may_be_late_when_python_ends(small, tmp_path):
    """On a busy machine gloo's threads let go of tensors after the exchange is over; three milliseconds made it SIGABRT."""
    (tmp_path / "late.cpp").write_text(LATE)
    subprocess.run(["c++", "-shared", "-fPIC", "-o", tmp_path / "late.so", tmp_path / "late.cpp", "-ldl"], check=True)
    done = torchrun(2, "train.py", *small, "--encoding=rope", "--name=r", env={"LD_PRELOAD": str(tmp_path / "late.so")})
    assert done.returncode == 0, done.stderr
    assert newest_checkpoint(tmp_path / "r")[1].step == 8
