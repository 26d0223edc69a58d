"""The table: plan, run, evaluate, render, restart."""

import json
import os
import signal

import pytest
import torch
from conftest import ROOT, Hold, run_command, start_command

from core.errors import UserError
from core.sweep.jobs import Job, Place, places, run_all, start
from core.tables import mean_and_error

SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--steps=4", "--warmup_steps=1", "--eval_tokens=500", "--final_eval_tokens=500",
    "--micro_batch=4", "--tokens_per_step=256", "--save_every=2",
]  # fmt: skip


@pytest.fixture
def words(corpus, tmp_path) -> list[str]:
    """A table of two encodings that takes seconds."""
    table = ["--sizes", "demo", "--encodings", "rope", "learned", "--lengths", "64", "128", "--max_tokens", "2000"]
    return ["table1.py", *table, f"--data={corpus}", f"--out_dir={tmp_path}", "--device=cpu", *SCALE]


def test_the_whole_table_and_its_restart(words, tmp_path):
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "table1.json").read_text())
    assert [(r["run"], r["length"]) for r in results] == [(f"demo-{e}", n) for e in ("rope", "learned") for n in (64, 128)]
    rope64, rope128, learned64, learned128 = (r["perplexity"] for r in results)
    assert learned128 is None and {r["tokens"] for r in results} == {2000, None}
    table = (tmp_path / "table1.md").read_text()
    assert f"| 64 | ours | {rope64:.2f} | {learned64:.2f} |" in table and f"| 128 | ours | {rope128:.2f} | – |" in table
    assert table in done.stdout
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "table1.png").stat().st_size > 10_000

    runs = [path for path in tmp_path.glob("demo-*/**/*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in runs}
    again = run_command(*words)
    assert again.returncode == 0 and again.stdout.count("finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in runs}

    (tmp_path / "demo-rope/eval.json").unlink()  # only what is missing is done again
    third = run_command(*words)
    assert third.returncode == 0 and "rope" in third.stdout
    assert json.loads((tmp_path / "table1.json").read_text())[0]["perplexity"] == rope64
    assert all(path.stat().st_mtime_ns == t for path, t in before.items() if path.name != "eval.json")


def test_the_plan_of_the_papers_table():
    """For the processes that are asked for; where none are, this machine has no GPU and says nothing of its hours."""
    done = run_command("table1.py", "--dry_run", "--out_dir=/nowhere/yet", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    names = [f"{size}-{encoding}" for size in ("tiny", "small") for encoding in ("rope", "carope", "learned", "sinusoidal")]
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    hours = {name: "1.0*" if "tiny" in name else "2.8*" for name in names} | {"small-rope": "2.7*"}
    assert all(lines[name] == ["missing", "9,961,472,000", hours[name]] for name in names)
    assert lines["together"] == ["79,691,776,000", "15.0"]
    *_, source, estimate = done.stdout.splitlines()
    assert "402 to 415 TFLOP/s per GPU, measured on NVIDIA H200, " in source and source.endswith("and $2.50 per GPU-hour")
    assert estimate.strip() == "1 GPU 29.7 hours, $74; 2 GPUs 15.0 hours, $75; 8 GPUs 3.9 hours, $77"
    of_eight, here = (run_command("table1.py", "--dry_run", *words).stdout for words in (["--nproc", 8], ["--device=cpu"]))
    assert "small-rope" in here and ["missing", "9,961,472,000", "–*"] in [line.split()[1:] for line in here.splitlines()]
    assert here.splitlines()[-1] == of_eight.splitlines()[-1] == estimate and "* predicted for 8 GPUs" in of_eight
    assert ["together", "79,691,776,000", "3.9"] in [line.split() for line in of_eight.splitlines()]


def test_the_plan_counts_what_is_done_and_uses_the_measured_speed(words, tmp_path):
    done = run_command("train.py", "config/demo.toml", "config/rope.toml", *words[11:])
    assert done.returncode == 0, done.stderr
    log = tmp_path / "demo-rope/log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "tokens_per_second": 0.1}) + "\n" for i in range(3)))
    done = run_command(*words, "--dry_run")
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["demo-rope"] == ["finished", "0", "0.0"]
    assert lines["demo-learned"] == ["missing", "1,024", "2.8"]  # 1024 tokens at the speed of its neighbor
    assert "TFLOP/s" not in done.stdout  # nothing is left to guess


def test_the_plan_says_where_it_cannot_estimate(words):
    """Three sequences a step: one GPU can take them, two cannot."""
    done = run_command(*words, "--dry_run", "--tokens_per_step=192", "--micro_batch=3")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["demo-rope"] == ["missing", "768", "–*"] and lines["1"][0] == "GPU" and "2 GPUs" not in lines["1"]


def test_a_folder_that_holds_another_run_is_planned_around_and_refused(words):
    assert run_command("train.py", "config/demo.toml", "config/rope.toml", *words[11:], "--n_embd=32").returncode == 0
    plan = run_command(*words, "--dry_run")
    assert plan.returncode == 0 and "another run" in plan.stdout and "n_embd = 32 (now 16)" in plan.stdout
    done = run_command(*words)
    assert done.returncode == 2 and "n_embd = 32 (now 16)" in done.stderr and done.stderr.count("\n") == 1


def test_another_seed_is_another_run(words, tmp_path):
    plan = run_command(*words, "--dry_run", "--seed=7")
    assert plan.returncode == 0 and "demo-rope-s7 " in plan.stdout and "demo-learned-s7 " in plan.stdout, plan.stderr


@pytest.mark.slow
def test_a_signal_stops_the_run_in_order_and_the_same_command_goes_on(words, tmp_path):
    words = [word for word in words if not word.startswith(("--steps", "--save_every", "--warmup"))]
    words += ["--steps=30", "--save_every=1000", "--warmup_steps=0", "--eval_every=1000"]
    hold, log = Hold(tmp_path, "core.optim:set_lr", 8), tmp_path / "demo-rope/log.jsonl"
    child = start_command(*words, env=hold.env)
    hold.reached(child)
    child.send_signal(signal.SIGTERM)
    hold.release()
    _, stderr = child.communicate()
    assert child.returncode == 75 and "the same command goes on" in stderr and "Traceback" not in stderr
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if "loss" in json.loads(line) and "lr" in line]
    assert steps == list(range(30))


@pytest.mark.slow
def test_ranks_are_started_wherever_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start("train.py", ["--help"], nproc=1) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--name=x"], "--name=x: a run here is called SIZE-ENCODING"),
        (["--stepz=3"], "did you mean --steps"),
        (["--encodings", "rop"], "config/rop.toml"),
        (["--n_head=3"], "n_head = 3"),
    ],
)
def test_refusals(words, extra, message):
    done = run_command(*words, *extra)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_seeds_several_at_a_time_and_configurations_by_path(words, tmp_path):
    """Means over seeds and differences within them; what a run says is in a file beside its folder."""
    mine = tmp_path / "mine.toml"
    mine.write_text('encoding = "xpos"\nxpos_scale_base = 64.0\n')
    words[words.index("rope") : words.index("learned") + 1] = ["rope", str(mine)]
    words[words.index("demo")] = str(ROOT / "config/demo.toml")
    done = run_command(*words, "--seeds", 1, 2, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "table1.json").read_text())
    assert [(r["run"], r["variant"], r["seed"]) for r in results[::2]] == [
        ("demo-rope", "rope", 1), ("demo-mine", "mine", 1), ("demo-rope-s2", "rope", 2), ("demo-mine-s2", "mine", 2),
    ]  # fmt: skip
    rope, other = ([r for r in results if r["variant"] == v and r["length"] == 64] for v in ("rope", "mine"))
    mean, error = mean_and_error([r["perplexity"] for r in rope])
    table = (tmp_path / "table1.md").read_text()
    assert f"| 64 | ours | {mean:.2f} ± {error:.2f} | " in table and "mean ± standard error over up to 2 seeds" in table
    mean, error = mean_and_error([a["nll"] - b["nll"] for a, b in zip(other, rope, strict=True)])
    assert (
        f"| mine | {mean:+.4f} ± {error:.4f} | " in table
        and "| nats per token more than rope, same seed | 64 | 128 | n |" in table
    )
    assert "step 4/4" in (tmp_path / "demo-mine-s2.txt").read_text()
    state = json.loads(next((tmp_path / "demo-mine").glob("checkpoints/*/state.json")).read_text())
    assert state["config"]["xpos_scale_base"] == 64.0
    again = run_command(*words, "--seeds", 1, 2)
    assert again.returncode == 0 and again.stdout.count("finished") == 4 and "[" not in again.stderr


def test_runs_at_a_time_have_gpus_of_their_own(monkeypatch):
    """As many as their processes; where there are fewer, runs of one process share them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus(*of: object) -> list[tuple[str, ...]]:
        return [place.gpus for place in places(*of)]

    assert gpus(1, 0, ["cuda"]) == gpus(1, 2, ["cuda"]) == [()]
    assert gpus(4, 0, ["cuda"]) == gpus(4, 1, ["cuda"]) == [("0",), ("1",), ("2",), ("3",)]
    assert gpus(2, 2, ["cuda"]) == [("0", "1"), ("2", "3")]
    assert gpus(6, 0, ["cuda"]) == [("0",), ("1",), ("2",), ("3",), ("0",), ("1",)]
    with pytest.raises(UserError, match="--jobs 3 of --nproc 2: need 6 GPUs, 4 are there"):
        places(3, 2, ["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a")
    assert gpus(2, 0, ["cuda"]) == [("3",), ("GPU-8a",)]
    assert gpus(2, 0, ["cpu"]) == [(), ()] and places(2, 0, ["cpu"])[0].threads == max(1, (os.cpu_count() or 1) // 2)


def test_a_place_that_is_free_again_is_the_next_jobs(tmp_path):
    script = tmp_path / "say.py"
    script.write_text("import os, sys\nprint(sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n")
    jobs = [Job(str(i), [[str(script), "a"], [str(script), "b"]], tmp_path / f"{i}.txt") for i in range(5)]
    order: list[str] = []
    assert run_all(jobs, [Place(("0",)), Place(("7", "8"))], 0, lambda job: order.append(job.name))
    said = [(tmp_path / f"{i}.txt").read_text().split() for i in range(5)]
    assert sorted(order) == list("01234") and all(words[:3:2] == ["a", "b"] and words[1] == words[3] for words in said)
    assert {words[1] for words in said} == {"0", "7,8"}


def test_two_runs_of_one_name_are_refused(words, tmp_path):
    mine = tmp_path / "rope.toml"
    mine.write_text('encoding = "rope"\nrope_base = 100.0\n')
    words[words.index("learned")] = str(mine)
    done = run_command(*words)
    assert done.returncode == 2 and "two runs of the name demo-rope; rename one of the files" in done.stderr, done.stderr
    assert not (tmp_path / "demo-rope").exists()


def test_a_run_under_another_name_is_pointed_at(words):
    """As one that an earlier version called otherwise."""
    more = [*words[words.index("--max_tokens") + 2 :], "--encoding=rope"]
    assert run_command("train.py", "config/demo.toml", *more, "--name=demo").returncode == 0
    again = run_command("train.py", "config/demo.toml", *more)
    assert again.returncode == 0 and "demo: has a run of the same configuration; --name=demo goes on with that" in again.stderr
