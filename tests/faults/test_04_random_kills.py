"""`make soak`: SIGKILL at random moments, 25 times each for training on two ranks, preparation and table1.py.

Seeded (SOAK_SEED, 1 unless given) and bounded: what is killed, and after how much progress, is drawn beforehand; the machine's
speed decides the rest. At the end every byte is that of an undisturbed run.
"""

import json
import os
import pydoc_data.topics
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import assert_same_run, newest_sums, run_command, spread, start_command

from core.checkpoint import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3000)]
KILLS = 25
SEED = int(os.environ.get("SOAK_SEED", "1"))


def last_step(run: Path) -> int:
    """The step of the last record in a run's log; -1 if there is none."""
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"}") else -1


def newest_step(run: Path) -> int:
    return int(list_checkpoints(run)[-1].name[5:]) if list_checkpoints(run) else 0


def begun_since(run: Path, wall: float) -> bool:
    """Whether a start has opened the run since the time `wall`; until then the log is that of the start that was killed."""
    env = run / "env.json"
    return env.exists() and env.stat().st_mtime >= wall and last_step(run) >= newest_step(run) - 1


def below(child) -> list[psutil.Process]:
    """The training ranks below a launcher."""
    try:
        return [p for p in psutil.Process(child.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def strike(child, target: str, rng: random.Random) -> None:
    """SIGKILL to the launcher, to one rank, or to all at once; then wait until nothing of it is left."""
    processes = below(child)
    if target == "a rank" and processes:
        victim = rng.choice(processes)
        victim.kill()
    elif target == "the launcher":
        child.kill()
    else:
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    psutil.wait_procs(processes, timeout=60)


def test_training_on_two_ranks(fault, small, tmp_path):
    happened = fault(f"{KILLS} SIGKILLs of training on two ranks: all at once, a rank, the launcher; starting, at work, saving")
    rng, run = random.Random(SEED), tmp_path / "r"
    words = ["core.launch", "--nproc_per_node=2", "train.py", *small, "--encoding=carope", "--steps=1300", "--save_every=5"]
    words += ["--n_embd=192", "--eval_every=100", "--keep_checkpoints=2"]
    struck: dict[str, int] = {}
    kept: list[int] = []
    recoveries: list[float] = []
    for kill in range(KILLS):
        target = rng.choice(["all", "a rank", "the launcher"])
        moment = rng.choices(["starting", "at work", "saving"], [1, 4, 4])[0]
        progress, delay = rng.randrange(40), rng.random()
        begun, first, wall = newest_step(run), time.monotonic(), time.time()
        child = start_command(*words, "--name=r", f"--async_checkpoint={'true' if kill % 2 else 'false'}", real=True)
        to_first_step = None
        while child.poll() is None:
            now = time.monotonic() - first
            if to_first_step is None and begun_since(run, wall):
                to_first_step = now
            if moment == "starting" and now > 6 * delay:
                break
            at_work = begun_since(run, wall) and last_step(run) >= begun + progress
            if at_work and moment == "at work":
                time.sleep(delay / 4)
                break
            if at_work and moment == "saving" and list(run.glob("checkpoints/.step_*")):
                time.sleep(delay / 50)
                break
            time.sleep(0.001)
        assert child.poll() is None, f"ended by itself at kill {kill}: {child.communicate()[1]}"
        strike(child, target, rng)
        key = f"{target}, {moment}"
        struck[key] = struck.get(key, 0) + 1
        kept.append(newest_step(run) - begun)
        recoveries += [to_first_step] if to_first_step else []
    for name in ("r", "whole"):
        done = run_command(*words, f"--name={name}")
        assert done.returncode == 0, done.stderr
    assert_same_run(run, tmp_path / "whole")
    starts = len(json.loads((run / "env.json").read_text()))
    happened(
        f"{KILLS} kills survived; weights, optimizer, RNG and log equal an undisturbed run to the last bit",
        kills=KILLS, seed=SEED, struck=struck, starts_on_record=starts, steps_kept_per_start=kept,
        start_to_first_step_s=spread(recoveries),
    )  # fmt: skip


def test_preparation(fault, tmp_path):
    happened = fault(f"{KILLS} SIGKILLs of prepare_fineweb.py at random moments")
    rng = random.Random(SEED)
    topics = sorted(pydoc_data.topics.topics.values())
    source = tmp_path / "text.jsonl"
    with open(source, "w") as file:
        while file.tell() < 60e6:
            file.write(json.dumps({"text": f"{rng.random()} " + rng.choice(topics)}) + "\n")
    words = ["prepare_fineweb.py", "--source", source, "--val_tokens", 100_000, "--shard_tokens", 80_000]
    done_shards, late = [], 0
    out = tmp_path / "out"
    for _ in range(KILLS):
        goal, first = len(list(out.glob("*.bin"))) + rng.randrange(6), time.monotonic()
        child = start_command(*words, "--out", out, "--workers", rng.choice([1, 2, 3]), real=True)
        delay = rng.choice([rng.uniform(0, 0.1), rng.uniform(0, 1)])
        while child.poll() is None and (len(list(out.glob("*.bin"))) < goal or time.monotonic() - first < delay):
            time.sleep(0.001)
        late += child.poll() is not None
        child.kill()
        child.communicate()
        done_shards.append(len(list(out.glob("*.bin"))))
    for folder in ("out", "whole"):
        done = run_command(*words, "--out", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    assert late == 0, f"{late} kills came after its end"
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / f).glob("*.*") if p.is_file()} for f in ("out", "whole"))
    assert one == other and len(one) > KILLS
    happened(f"{KILLS} kills survived; {len(one) - 1} shards and the manifest are byte-identical", kills=KILLS, seed=SEED,
             shards_after_each_kill=done_shards)  # fmt: skip


def test_table1(fault, corpus, tmp_path):
    happened = fault(f"{KILLS} SIGKILLs of table1.py, alone or with all it started")
    rng = random.Random(SEED)
    words = ["table1.py", "--sizes", "demo", "--encodings", "rope", "carope", "--lengths", "64", "128", "--max_tokens", "8192"]
    words += [f"--data={corpus}", "--steps=400", "--warmup_steps=10", "--save_every=10", "--eval_every=50"]
    killed = {"alone": 0, "with all": 0}
    out = tmp_path / "out"
    for kill in range(KILLS):
        child = start_command(*words, f"--out_dir={out}", real=True)
        run = out / ("demo-rope" if kill < KILLS // 2 else "demo-carope")
        goal, first = newest_step(run) + rng.randrange(30), time.monotonic()
        while child.poll() is None and last_step(run) < goal and time.monotonic() - first < 25:
            time.sleep(0.002)
        assert child.poll() is None, f"ended by itself at kill {kill}: {child.communicate()[1]}"
        time.sleep(rng.random() / 3)
        how = rng.choice(list(killed))
        killed[how] += 1
        if how == "alone":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    for folder in ("out", "whole"):
        done = run_command(*words, f"--out_dir={tmp_path / folder}")
        assert done.returncode == 0, done.stderr
    for name in ("demo-rope", "demo-carope"):
        assert newest_sums(out / name) == newest_sums(tmp_path / "whole" / name)
    one, other = (json.loads((tmp_path / f / "table1.json").read_text()) for f in ("out", "whole"))
    assert [r["perplexity"] for r in one] == [r["perplexity"] for r in other] and len(one) == 4
    happened(f"{KILLS} kills survived; the weights and the table are those of an undisturbed run", kills=KILLS, seed=SEED,
             killed=killed)  # fmt: skip
