"""Weights & Biases by its real client: offline into files, online to a server on loopback, perplexities into the same run."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from collections import Counter

import pytest
import torch
import wandb
import wandb_server
from conftest import Hold, logged, records, run_command, start_command

from core import upload as upload_module
from core.checkpoint import find_checkpoint
from core.config import load_config
from core.distributed import Distributed
from core.errors import UserError
from core.files import locked
from core.sweep.plan import Entry
from core.sweep.sweep import run_left, share
from core.trackers import WANDB_ID, start_wandb, wandb_history
from core.upload import COLUMNS, summary_key, tracked, upload
from eval_ppl import evaluate_run
from train import train

WORDS = ["--encoding=carope", "--name=r"]
LONGER = [*WORDS, "--micro_batch=16", "--steps=40", "--save_every=40", "--eval_every=20"]
LENGTHS = ["--lengths", "32", "64"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of `learned` positions that was trained with --wandb=offline."""
    words = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=320", "--block_size=32", "--micro_batch=8"]
    words += ["--dtype=float32", "--tokens_per_step=512", "--steps=8", "--warmup_steps=2", "--final_eval_tokens=500"]
    out = tmp_path_factory.mktemp("trained")
    words += [f"--data={corpus}", f"--out_dir={out}", "--device=cpu", "--encoding=learned", "--name=r"]
    words += ["--wandb=offline", "--wandb_project=p"]
    assert train(load_config(words)) == 0
    return out / "r"


@pytest.fixture
def offline(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "r")


def rows(results):
    return [{key: result[key] for key in COLUMNS} for result in results]


def assert_has_log(stored, folder):
    """The server's history of a run is the run folder's log, each record once and with its values."""
    log = records(folder)
    assert len(stored.history) == len(log)
    for row, record in zip(stored.history, log, strict=True):
        assert {key: row[key] for key in record} == record


def assert_has_results(stored, results):
    """The server's run has the numbers of eval_ppl.py's JSON, as a table and in its summary."""
    assert stored.table("perplexity") == rows(results)
    assert [stored.summary[summary_key(r)] for r in results] == [r["perplexity"] for r in results]


def evaluate(folder, json_file, *words, **kwargs):
    done = run_command("eval_ppl.py", folder, *LENGTHS, "--max_tokens=2000", "--wandb", "--json", json_file, *words, **kwargs)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(json_file.read_text())


@pytest.mark.slow
def test_online_a_run_goes_on_under_its_id_and_gets_its_perplexities(small, tmp_path):
    with wandb_server.serving() as server:
        env = wandb_server.client_env(server.url, tmp_path)
        words = [*small, *LONGER, "--wandb=online", "--wandb_project=p"]
        hold = Hold(tmp_path, "core.optim:set_lr", 20)
        child = start_command("train.py", *words, env=env | hold.env)
        hold.reached(child)
        ((run_id, stored),) = server.runs.items()
        assert stored.exit_code is None
        child.send_signal(signal.SIGTERM)
        hold.release()
        child.communicate()
        assert child.returncode == 75 and stored.exit_code is not None
        assert_has_log(stored, tmp_path / "r")

        done = run_command("train.py", *words, env=env)
        assert done.returncode == 0, done.stderr
        assert list(server.runs) == [run_id] == [(tmp_path / "r/wandb_id").read_text()]
        assert server.asked.count("RunResumeStatus") == 2 and stored.exit_code == 0
        assert (stored.project, stored.name) == ("p", "r")
        assert {key: stored.config[key]["value"] for key in ("encoding", "lr", "steps")} == {
            "encoding": "carope", "lr": 0.01, "steps": 40
        }  # fmt: skip
        assert [row["step"] for row in stored.history if "lr" in row] == list(range(40))
        assert_has_log(stored, tmp_path / "r")

        results = evaluate(tmp_path / "r", tmp_path / "r.json", env=env)
        assert_has_results(stored, results)
        assert stored.exit_code == 0 and stored.summary["step"] == 40
        assert_has_log(stored, tmp_path / "r")  # which the evaluation has not touched
        (artifact,) = server.artifacts.values()
        assert artifact.committed and (artifact.run, artifact.kind) == (run_id, "run_table")
        assert server.unknown == []

        server.key = "another"
        done = run_command("eval_ppl.py", tmp_path / "r", "--lengths", 16, "--wandb", "--json", tmp_path / "16.json", env=env)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "401" in done.stderr
        assert len(json.loads((tmp_path / "16.json").read_text())) == 1 and "perplexity ±" in done.stdout  # nothing is lost


def test_offline_perplexities_leave_the_history_alone_and_sync_sends_it_all(offline, tmp_path):
    before = wandb_history(tmp_path / "r")
    checkpoint = offline / "checkpoints/step_000008"
    results = evaluate_run(checkpoint, [32, 64], Distributed(torch.device("cpu"), torch.float32), max_tokens=500)
    upload(checkpoint, results)
    assert [r["perplexity"] is None for r in results] == [False, True]  # learned positions end at 32
    assert wandb_history(tmp_path / "r") == before == Counter((r["step"], "val_loss" in r) for r in records(tmp_path / "r"))
    starts = sorted((tmp_path / "r/wandb").glob("offline-run-*"))
    assert len(starts) == 2
    with wandb_server.serving() as server:
        env = wandb_server.client_env(server.url, tmp_path)
        subprocess.run([sys.executable, "-m", "wandb", "sync", *starts], env=os.environ | env, cwd=tmp_path, check=True)
        ((run_id, stored),) = server.runs.items()
        assert run_id == (tmp_path / "r/wandb_id").read_text() and stored.project == "p"
        assert stored.config["encoding"]["value"] == "learned"
        assert_has_log(stored, tmp_path / "r")
        assert stored.table("perplexity") == rows(results)
        assert stored.summary["perplexity/32/first500"] == results[0]["perplexity"]
        assert not any(key.startswith("perplexity/64") for key in stored.summary)
        *_, train, val = records(tmp_path / "r")
        assert (stored.summary["loss"], stored.summary["val_loss"]) == (train["loss"], val["val_loss"])
        assert server.unknown == []


@pytest.mark.slow
def test_a_server_that_goes_away_stops_no_training(small, tmp_path):
    with wandb_server.serving() as server:
        env = wandb_server.client_env(server.url, tmp_path) | {"WANDB_FINISH_TIMEOUT": "3"}
        words = [*small, *LONGER, "--wandb=online"]
        hold = Hold(tmp_path, "core.optim:set_lr", 20)
        child = start_command("train.py", *words, env=env | hold.env)
        hold.reached(child)
        server.die()
        hold.release()
        _, stderr = child.communicate()
    assert child.returncode == 0, stderr
    assert [r["step"] for r in records(tmp_path / "r") if "lr" in r] == list(range(40))
    (stored,) = server.runs.values()
    assert len(stored.history) <= 21 and stored.exit_code is None


def test_a_start_with_a_wrong_key_is_one_line(small, tmp_path):
    with wandb_server.serving() as server:
        env = wandb_server.client_env(server.url, tmp_path, "f" * 40)
        done = run_command("train.py", *small, *WORDS, "--wandb=online", env=env)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: wandb = 'online': ") and "401" in done.stderr and "--wandb=offline" in done.stderr
        assert not server.runs and logged(tmp_path / "r") == 0


@pytest.mark.parametrize("problem", ["no key", "nobody there", pytest.param("no answer", marks=pytest.mark.slow)])
def test_a_start_that_cannot_be_is_given_up(tmp_path, monkeypatch, problem):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if problem == "no answer":
            server.listen()
        url, key = f"http://127.0.0.1:{server.getsockname()[1]}", "" if problem == "no key" else wandb_server.KEY
        wandb.teardown()  # it has read the environment and keeps it
        settings = wandb_server.client_env(url, tmp_path, key) | {"WANDB_INIT_TIMEOUT": "5", "HOME": str(tmp_path)}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        (tmp_path / WANDB_ID).write_text(secrets.token_hex(4))
        said = {"no key": "No API key", "nobody there": "connection refused", "no answer": "deadline exceeded"}[problem]
        with pytest.raises(UserError, match=f"^wandb = 'online': .*{said}.*; --wandb=offline needs no account$"):
            start_wandb(load_config(["--wandb=online"]), tmp_path)
        wandb.teardown()


def test_perplexities_of_a_run_without_wandb_are_refused_before_anything_is_computed(runs):
    done = run_command("eval_ppl.py", runs / "carope", "--wandb", "--data=/nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"--wandb: {runs / 'carope'} was trained without wandb" in done.stderr


def test_nothing_is_uploaded_while_the_run_is_trained(offline, monkeypatch):
    monkeypatch.setattr(upload_module, "LOCK_PATIENCE_S", 0)
    assert tracked(offline)[0] == tracked(offline / "checkpoints/step_000008")[0] == offline
    with locked(offline), pytest.raises(UserError, match="at work there"):
        upload(offline, [])
    assert len(list(offline.glob("wandb/offline-run-*"))) == 1


def test_the_table_uploads_the_perplexities_of_its_runs(offline):
    cfg = load_config([str(offline / "config.toml"), f"--out_dir={offline.parent}"])
    entry = Entry("tiny", "learned", (), cfg, find_checkpoint(offline)[1])
    args = Namespace(lengths=[16, 64], max_tokens=500, nproc=0, jobs=1, minutes=0, stagger=0, documents=0)
    assert list(run_left([entry], 1, args, lambda found: None)) == [entry]
    (table,) = offline.glob("wandb/offline-run-*/files/media/table/perplexity*.json")
    results = json.loads((offline / "eval.json").read_text())
    assert json.loads(table.read_text())["data"] == [list(row.values()) for row in rows(results)]
    assert [r["length"] for r in results] == [16, 64]


def test_the_table_does_without_an_upload_that_fails(runs, capsys):
    share(runs / "carope", [])
    assert capsys.readouterr().err == (
        f"warning: --wandb: {runs / 'carope'} was trained without wandb, which has no run to put its perplexities into; "
        f"eval_ppl.py {runs / 'carope'} --wandb uploads its perplexities\n"
    )


def test_an_unusable_setting_in_the_environment_is_one_line(small):
    done = run_command("train.py", *small, "--name=r", "--wandb=offline", env={"WANDB_SILENT": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "silent" in done.stderr
