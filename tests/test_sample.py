"""Sampling through its command."""

import json
import shutil

import pytest
from conftest import run_command

from core.checkpoint import sealed


def test_prompts_samples_and_seeds(runs, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße")
    words = [runs / "carope", "--prompt", "One", "--file", tmp_path / "prompt.txt", "--max_new_tokens", 80, "--top_k", 5]
    done = run_command("sample.py", *words, "--num_samples", 2, "--seed", 3)
    assert done.returncode == 0, done.stderr
    samples = done.stdout.split("--- ")[1:]
    assert [s.splitlines()[0].split("seed ")[1] for s in samples] == ["3", "4", "3", "4"]
    texts = [s.split("\n", 1)[1] for s in samples]
    assert all(t.startswith(p) for t, p in zip(texts, ["One", "One", "Grüße", "Grüße"], strict=True))
    assert texts[0] != texts[1]
    again = run_command("sample.py", *words[:3], "--max_new_tokens", 80, "--top_k", 5, "--seed", 4)
    assert again.stdout.split("\n", 1)[1] == texts[1]  # sample i depends on seed + i alone


def test_a_prompt_from_standard_input_and_greedy_decoding(runs):
    words = ["sample.py", runs / "carope", "--file", "-", "--temperature", 0, "--max_new_tokens", 10]
    one, two = (run_command(*words, "--seed", seed, input="The ") for seed in (1, 2))
    assert one.returncode == 0 and one.stdout.split("\n", 1)[1].startswith("The ")
    assert one.stdout.split("\n", 1)[1] == two.stdout.split("\n", 1)[1]


def test_samples_drawn_together_are_those_drawn_alone(runs):
    words = ["sample.py", runs / "carope", "--prompt", "One ", "--max_new_tokens", 60, "--num_samples", 5]
    alone, together = run_command(*words), run_command(*words, "--batch", 3)
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout and alone.stdout.count("--- ") == 5


def test_past_the_training_length_unless_the_encoding_cannot(runs):
    long = run_command("sample.py", runs / "carope", "--prompt", "x", "--max_new_tokens", 100, "--temperature", 0)
    assert long.returncode == 0 and "stopped" not in long.stderr
    short = run_command("sample.py", runs / "learned", "--prompt", "x", "--max_new_tokens", 100, "--temperature", 0)
    assert short.returncode == 0
    assert "encoding 'learned' has positions for 32 tokens only: stopped after 31 new ones" in short.stderr


def test_a_run_whose_tokenizer_nobody_recorded_is_refused(runs, tmp_path):
    shutil.copytree(runs / "carope", tmp_path / "r")
    (state,) = tmp_path.glob("r/checkpoints/*/state.json")
    state.write_text(sealed(json.loads(state.read_text()) | {"tokenizer": "gpt2"}))
    done = run_command("sample.py", tmp_path / "r")
    assert done.returncode == 2 and "320 ids are fewer than the 50257 of 'gpt2'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--temperature", "-1"], "--temperature = -1.0: must be at least 0"),
        (["{run}", "--batch", "0"], "--batch = 0: must be at least 1"),
        (["{run}", "--top_p", "2"], "--top_p = 2.0: must be above 0 and at most 1"),
        (["{run}", "--prompt", "x" * 40], "prompt of 40 tokens: encoding 'learned' has positions for 32 only"),
        (["{run}", "--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["nowhere"], "nowhere: no such run or checkpoint"),
    ],
)
def test_refusals(runs, words, message):
    done = run_command("sample.py", *(word.format(run=runs / "learned") for word in words))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
