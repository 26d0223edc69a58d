"""The laboratory: grid, restart, time limit, means and paired differences, table and figure."""

import json
import math
import shutil
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Hold, run_command

from core.documents import load
from core.errors import EXIT_REQUEUE, UserError
from core.sweep import jobs
from core.sweep.report import summarize
from core.tables import mean_and_error
from lab import sweep
from lab.sweep_report import family, render
from positional import ENCODINGS

SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--steps=4", "--warmup_steps=1", "--eval_tokens=500", "--final_eval_tokens=500",
    "--micro_batch=4", "--tokens_per_step=256", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def words(corpus, tmp_path) -> list[str]:
    """Two runs that take seconds."""
    grid = ["--encodings", "rope", "learned", "--seeds", "2", "--lengths", "64", "128", "--max_tokens", "2000"]
    return ["lab.sweep", *grid, f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]


def test_a_grid_two_runs_at_a_time_its_report_and_its_restart(words, tmp_path):
    done = run_command(*words, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "lab.json").read_text())
    assert {(r["encoding"], r["seed"], r["length"]) for r in found["runs"]} == {
        (encoding, 2, length) for encoding in ("rope", "learned") for length in (64, 128)
    }
    for encoding in ("rope", "learned"):
        own = json.loads((tmp_path / f"lab-{encoding}-s2/eval.json").read_text())
        mine = [r for r in found["runs"] if r["encoding"] == encoding]
        assert [r["perplexity"] for r in mine] == [r["perplexity"] for r in own]
        assert json.loads((tmp_path / f"lab-{encoding}-s2/eval.json").read_text())[0]["tokens"] == 2000
    table = (tmp_path / "lab.md").read_text()
    assert table == render(found) and table in done.stdout and "| learned | " in table
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "lab.png").stat().st_size > 10_000
    assert found["baseline"] == "rope" and found["train_tokens"] == 1024 and found["config"]["n_embd"] == 16

    old = [r | {"source": "0" * 64} if r["encoding"] == "learned" else r for r in found["runs"]]
    marked = render(found | {"runs": old})
    assert "| learned † | " in marked and "| rope | " in marked and "† by code of the encoding that has changed" in marked

    runs = [path for path in tmp_path.glob("lab-*/**/*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in runs}
    again = run_command(*words)
    assert again.returncode == 0 and again.stdout.count("finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in runs}
    assert json.loads((tmp_path / "lab.json").read_text()) == found


def test_a_variant_belongs_to_the_family_of_its_encoding():
    families = [family(variant) for variant in ("sinusoidal", "sinusoidal_equal", "carope_hidden", "no_such")]
    assert families == ["none, or added to embeddings"] * 2 + ["context-aware rotary", "other"]


def test_it_goes_on_from_its_results_when_the_runs_are_gone(words, tmp_path):
    """Of other documents or another model it refuses to."""
    out = tmp_path / "kept.json"
    more = ["--documents", "200", "--json", out, "--jobs", "2"]
    first = run_command(*words, *more)
    assert first.returncode == 0, first.stderr
    before, losses = json.loads(out.read_text()), load(out.with_suffix(".npz"))
    assert {r["min_document_tokens"] for r in before["runs"]} == {200} and all(r["bits_per_byte"] for r in before["runs"][:2])
    for folder in tmp_path.glob("lab-*-s2"):
        shutil.rmtree(folder)

    words[words.index("rope") : words.index("learned") + 1] = ["learned", "nope"]
    second = run_command(*words, *more)
    assert second.returncode == 0 and f"{out} has 1 of the 2 runs already" in second.stdout, second.stderr
    assert [path.name for path in tmp_path.glob("lab-*-s2")] == ["lab-nope-s2"]
    after, more_losses = json.loads(out.read_text()), load(out.with_suffix(".npz"))
    assert after["runs"][: len(before["runs"])] == before["runs"] and after["baseline"] == "learned"
    assert [r["encoding"] for r in after["runs"]] == ["rope"] * 2 + ["learned"] * 2 + ["nope"] * 2
    assert more_losses.runs.tolist() == [*losses.runs.tolist(), "lab-nope-s2"]
    assert np.array_equal(more_losses.loss[:2], losses.loss, equal_nan=True)
    for r in after["runs"]:
        if r["nll"] is not None:
            row = more_losses.runs.tolist().index(f"lab-{r['encoding']}-s2")
            sums_D = more_losses.loss[row, more_losses.lengths.tolist().index(r["length"])]
            assert sums_D.sum() / more_losses.tokens.sum() == pytest.approx(r["nll"], rel=1e-9)

    kept = out.read_bytes()
    for other, message in (
        (["--documents", "100"], "min_document_tokens = 200 (now 100)"),
        (["--n_embd=32"], "n_embd = 16 (now 32)"),
    ):
        refused = run_command(*words, *more, *other)
        assert refused.returncode == 2 and message in refused.stderr and out.read_bytes() == kept
    out.write_text("[]")
    refused = run_command(*words, *more)
    assert refused.returncode == 2 and "not a report of lab.sweep" in refused.stderr and out.read_text() == "[]"


@pytest.mark.slow
def test_when_time_is_up_what_runs_is_saved_and_the_next_call_goes_on(words, tmp_path, monkeypatch):
    """By a clock that stands still until the run of the first encoding is in its third step, and then is far ahead."""
    words.append("--log_every=1")
    hold, stop = Hold(tmp_path, "core.optim:set_lr", 3), jobs.Job.stop
    clock = SimpleNamespace(monotonic=lambda: 1e9 if hold.is_reached() else 0.0, sleep=time.sleep)
    for name, value in hold.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs, "time", clock)
    monkeypatch.setattr(jobs.Job, "stop", lambda job: (stop(job), hold.release()))
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "1000"])
    with pytest.raises(SystemExit) as left:
        sweep.main()
    assert left.value.code == EXIT_REQUEUE
    assert [path.name for path in (tmp_path / "lab-rope-s2/checkpoints").iterdir()] == ["step_000003"]
    again = run_command(*words)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "lab-rope-s2/log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(5))
    assert len(json.loads((tmp_path / "lab.json").read_text())["runs"]) == 4


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_what_it_said_and_the_others_finish(words, tmp_path):
    words[words.index("rope") : words.index("learned") + 1] = ["learned", "nope", "rope"]
    words += ["--jobs", "2"]
    (tmp_path / "lab-nope-s2").mkdir(parents=True)
    (tmp_path / "lab-nope-s2/config.toml").mkdir()  # where the run wants a file
    done = run_command(*words)
    assert (
        done.returncode == 2 and "lab-nope-s2: failed with exit code" in done.stderr and "cannot be written" in done.stderr
    ), done.stderr
    assert done.stderr.strip().count("\n") == 0
    found = json.loads((tmp_path / "lab.json").read_text())
    assert {r["encoding"] for r in found["runs"]} == {"learned", "rope"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name=x"], "--name=x: a run here is called SIZE-ENCODING"),
        (["--seed=3"], "gets its encoding and seed from --encodings and --seeds"),
        (["--encodings", "rop"], "config/rop.toml"),
        (["--json", "lab.md"], "--json lab.md: is the name of what goes beside it"),
        (["--jobs", "0"], "--jobs = 0: must be at least 1"),
        (["--minutes", "-1"], "--minutes = -1.0: must be at least 0"),
        (["--minutes", "nan"], "--minutes = nan"),
        (["--lengths", "0"], "--lengths = 0"),
        (["config/nowhere.toml"], "config/nowhere.toml"),
        (["--stepz=3"], "did you mean --steps"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab.sweep", *words])
    with pytest.raises(UserError, match=message) as caught:
        sweep.main.__wrapped__()
    assert "\n" not in str(caught.value)


def test_the_default_grid_is_every_encoding_after_rope(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab.sweep"])
    args, _ = sweep.parse_args()
    assert args.encodings[0] == "rope" and sorted(args.encodings) == sorted(ENCODINGS)


def test_means_errors_and_differences_within_a_seed():
    nll = {("a", 1): 1.0, ("a", 2): 1.4, ("b", 1): 1.1, ("b", 2): 1.6, ("c", 1): None}
    runs = [{"encoding": e, "seed": s, "length": 64, "nll": x, "perplexity": x and math.exp(x)} for (e, s), x in nll.items()]
    a, b, c = summarize(runs, "a")
    assert (a["nll"], a["n"], a["nll_difference"]) == (pytest.approx(1.2), 2, 0)
    assert b["nll_difference"] == pytest.approx(0.15) and b["nll_difference_stderr"] == pytest.approx(0.05)
    assert a["nll_stderr"] == pytest.approx(statistics.stdev([1.0, 1.4]) / math.sqrt(2))
    assert (c["n"], c["perplexity"], c["nll_difference"]) == (0, None, None)
    assert mean_and_error([3.0]) == (3.0, None)
