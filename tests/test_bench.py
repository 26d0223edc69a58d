"""lab.bench at toy sizes: what its last line holds, and that it holds together. Never how fast it is."""

import json

import pytest
from conftest import ROOT, run_command
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.measure import interleave, speedup, spread
from lab.bench.peers import load_definitions

TOY = [
    "--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=320", "--block_size=32", "--micro_batch=4",
    "--tokens_per_step=512", "--device=cpu", "--synthetic", "--rounds=2", "--warmup=1",
]  # fmt: skip
PEER = """
from dataclasses import dataclass
import torch
import a_package_that_is_not_there

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_embd: int

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

raise SystemExit("the training script itself must not run")
"""


def last_line(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_training_beside_another_encoding_and_another_checkout(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/train_gpt2.py").write_text(PEER)
    encodings = ["rope", "carope", "rope,rope_base=500"]
    words = ["--encodings", *encodings, "--vs", tmp_path / "other", "--profile", tmp_path / "profile.txt"]
    out = tmp_path / "result.json"
    found = last_line(run_command("lab.bench", "train", *TOY, *words, "--micro_steps=2", "--json", out))
    assert json.loads(out.read_text()) == found
    wanted = {
        "tokens_per_second", "ms_median", "matmul_tflops", "mfu_measured", "peak_memory_bytes", "encoding", "config", "device",
        "git", "command", "torch", "ms_p10", "ms_p90", "attention", "n_params", "data_wait_share", "first_step_seconds",
    }  # fmt: skip
    assert wanted <= set(found)
    assert [one["candidate"] for one in found["results"]] == encodings
    assert [one["encoding"] for one in found["results"]] == ["rope", "carope", "rope"] and found["encoding"] == "rope"
    assert found["config"]["tokens_per_step"] == 2 * 4 * 32
    for one in found["results"]:
        assert one["ms_p10"] <= one["ms_median"] <= one["ms_p90"] and one["n"] == 2
        assert one["tokens_per_second"] == pytest.approx(256 / one["ms_median"] * 1e3, rel=1e-3)
        rate = one["tokens_per_second"] * one["flops_per_token"] / one["matmul_tflops"] / 1e12
        assert one["mfu_measured"] == pytest.approx(rate, rel=2e-2)
        assert 0 < one["data_wait_share"] < 1
    assert [peer["peer"] for peer in found["peers"]] == ["other, as shipped"]
    assert "aten::" in (tmp_path / "profile.txt").read_text()


@pytest.mark.slow
def test_evaluation_beside_training():
    found = last_line(run_command("lab.bench", "eval", *TOY))
    assert {"tokens_per_second", "train_tokens_per_second", "eval_over_train", "mfu_measured"} <= set(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--encodings", "rpoe"], "rpoe"),
        (["train", "--vs", "nowhere"], "--vs nowhere: no model.py or train_gpt2.py"),
        (["train", "--vs", str(ROOT / "core/config.py")], "defines no GPT and GPTConfig"),
        (["train", "--rounds", "0"], "--rounds = 0: must be at least 1"),
        (["train", "--no_such_option"], "no such option"),
    ],
)
def test_mistakes_are_one_line(words, message):
    done = run_command("lab.bench", *words[:1], *TOY[:-2], *words[1:])
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_candidate_that_dies_costs_no_other_its_result(tmp_path):
    """The baseline, another size of it and a peer that dies: exit code 2, and all else is in the JSON."""
    (tmp_path / "model.py").write_text(PEER.replace("return logits, ", "raise ValueError('no luck')\n        return logits, "))
    (tmp_path / "wide.toml").write_text("n_embd = 64\n")
    words = ["--encodings", "rope", f"rope,{tmp_path}/wide.toml", "nope,block_size=16", "--no_bare", "--at_once=2"]
    out, toy = tmp_path / "result.json", [word for word in TOY if word not in ("--n_embd=32", "--block_size=32")]
    (tmp_path / "base.toml").write_text("n_embd = 32\nblock_size = 32\n")
    done = run_command("lab.bench", "train", tmp_path / "base.toml", *toy, *words, "--vs", tmp_path, "--json", out)
    assert done.returncode == 2 and "ended with exit code 1" in done.stderr and "no luck" in done.stderr
    found = json.loads(out.read_text())
    assert list(found["failed"]) == [f"{tmp_path.name}, as shipped"] and "unfinished" not in found
    assert [one["config"]["n_embd"] for one in found["results"]] == [32, 64, 32]
    assert [one["vs_baseline"] for one in found["results"]] == [1, 1, 1]  # each the first of its shape
    assert found["results"][2]["config"]["block_size"] == 16


def test_the_rounds_wait_for_a_line(tmp_path):
    out = tmp_path / "result.json"
    found = last_line(run_command("lab.bench", "train", *TOY, "--no_bare", "--wait", "--json", out, input="\n"))
    assert found["n"] == 2


ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_not_under_torchrun():
    done = run_command("lab.bench", "train", *TOY, env=ALONE)
    assert done.returncode == 2 and "table1.py --preflight" in done.stderr


def test_imports_that_fail_and_code_of_a_peer_are_left_out(tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    assert load_definitions(tmp_path).GPTConfig(1, 2, 3).n_embd == 3
    (tmp_path / "model.py").write_text("def broken(")
    with pytest.raises(UserError, match="can be read"):
        load_definitions(tmp_path)


def test_every_candidate_runs_once_in_every_round():
    calls: list[str] = []
    seconds = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=40, warmup=2)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 40)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(set(order) == set("abc") for order in rounds) and len(set(rounds)) == 6  # in every order there is


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50), st.integers(1, 10**9))
def test_spread_is_ordered_and_a_speedup_over_oneself_is_one(seconds, tokens):
    found = spread(seconds, tokens)
    assert found["ms_p10"] <= found["ms_median"] + 1e-3 and found["ms_median"] <= found["ms_p90"] + 1e-3
    assert found["n"] == len(seconds) and speedup(seconds, seconds) == 1


def test_help_of_every_benchmark():
    for name in ("machine", "train", "eval", "decode", "scaling", "overlap"):
        assert "lab.bench" in run_command("lab.bench", name, "--help").stdout
