"""lab.analyze tasks: they can be solved and not guessed, the right tokens are scored, runs trained on them do better."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_positional import build, tokens

import lab.analyze.__main__ as analyze
from core.config import load_config
from core.errors import UserError
from lab.analyze import task_data, tasks
from lab.analyze.task_data import SHORTEST, TASKS, VOCABULARIES, Example, block, example, ids_of
from lab.pages import findings
from positional import ENCODINGS
from text.shards import find_shards, open_shard, read_manifest
from text.tokenizer import load_tokenizer
from train import train

task_names = st.sampled_from(sorted(TASKS))
lengths = st.integers(SHORTEST, 300)
indices = st.integers(0, 10_000)
vocabularies = st.sampled_from(sorted(VOCABULARIES))
unhurried = settings(deadline=None, max_examples=60)


def text_of(one: Example, tokenizer: str = "bytes") -> str:
    """The example's characters, without its end-of-text token."""
    return load_tokenizer(tokenizer).decode_bytes(one.tokens[1:].tolist()).decode()


def solve(task: str, text: str, n_answers: int) -> str:
    """What comes next in a text without its answers, by reading it."""
    if task == "copy":
        return text[:n_answers]
    if task == "induction":
        return text[text.index(text[-1]) + 1]
    if task == "passkey":
        return text.partition("#")[2][:n_answers]
    return str(text.count("*"))


@unhurried
@given(task_names, lengths, indices, vocabularies)
def test_an_example_has_its_length_and_can_be_solved_by_reading_it(task, length, index, tokenizer):
    one = example(task, 1, "eval", index, length, tokenizer)
    assert len(one.tokens) == length and one.tokens[0] == VOCABULARIES[tokenizer].eot
    assert one.tokens.dtype == np.uint16 and (one.tokens[1:] < 256).all()
    text = text_of(one, tokenizer)
    question, answer = text[: -one.answers], text[-one.answers :]
    assert solve(task, question, one.answers) == answer
    assert set(answer.encode()) <= set(TASKS[task].choices.tolist())
    assert one.depth is None or 0 <= one.depth <= 1


@unhurried
@given(task_names, lengths, indices, st.integers(0, 2**63 - 1))
def test_it_is_a_pure_function_and_the_same_text_in_both_vocabularies(task, length, index, seed):
    one, again, gpt2 = (example(task, seed, "val", index, length, name) for name in ("bytes", "bytes", "gpt2"))
    assert np.array_equal(one.tokens, again.tokens) and one[1:] == again[1:] == gpt2[1:]
    assert text_of(one) == text_of(gpt2, "gpt2")


def test_characters_are_the_tokenizers_own():
    printable = bytes(range(127))
    for name in VOCABULARIES:
        assert load_tokenizer(name).decode_bytes(ids_of(printable, name).tolist()) == printable


@pytest.mark.parametrize("task", TASKS)
def test_a_guess_is_right_as_often_as_chance_says(task):
    """A model of random logits, and one that always says the same: five standard errors at most from one in so many."""
    choices_K, n = (
        torch.from_numpy(TASKS[task].choices.astype("int64")),
        4000 if TASKS[task].draw is not task_data.copy else 800,
    )
    drawn = [example(task, 1, "eval", i, 24, "bytes") for i in range(n)]
    answers_BA = torch.tensor(np.stack([one.tokens[-one.answers :] for one in drawn]).astype("int64"))
    generator, chance = torch.Generator().manual_seed(1), 1 / len(choices_K)
    error = math.sqrt(chance * (1 - chance) / answers_BA.numel())
    logits_BAK = torch.randn(*answers_BA.shape, len(choices_K), generator=generator)
    right_BA, _ = tasks.grade(logits_BAK, answers_BA, choices_K)
    assert abs(right_BA.double().mean() - chance) < 5 * error
    same = [
        tasks.grade(torch.eye(len(choices_K))[k].expand_as(logits_BAK), answers_BA, choices_K)[0] for k in range(len(choices_K))
    ]
    shares = torch.stack(same).double().mean((1, 2))
    assert shares.sum() == pytest.approx(1) and (shares - chance).abs().max() < 5 * error
    _, nll_BA = tasks.grade(torch.zeros_like(logits_BAK), answers_BA, choices_K)
    assert nll_BA.mean().item() == pytest.approx(math.log(len(choices_K)))


@unhurried
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.data())
def test_a_grade_is_that_of_a_softmax_over_the_choices(b, a, k, data):
    choices_K = torch.tensor(data.draw(st.permutations(range(100)))[:k])
    index_BA = torch.randint(k, (b, a))
    logits_BAK = torch.randn(b, a, k)
    right_BA, nll_BA = tasks.grade(logits_BAK, choices_K[index_BA], choices_K)
    expected = torch.nn.functional.cross_entropy(logits_BAK.double().flatten(0, 1), index_BA.flatten(), reduction="none")
    torch.testing.assert_close(nll_BA.flatten(), expected)
    assert torch.equal(right_BA, logits_BAK.argmax(-1) == index_BA)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
@pytest.mark.parametrize("n_answers", [1, 7])
def test_the_logits_are_the_models_own_at_the_answers(encoding, n_answers, monkeypatch):
    monkeypatch.setattr("core.evaluate.PIECE", 4)  # with a cache, where the encoding makes its weights itself
    model, idx, choices_K = build(encoding), tokens(32), torch.tensor([7, 3, 60])
    with torch.no_grad():
        expected = model(idx)[:, -n_answers:][..., choices_K]
        found = tasks.answer_logits(model, idx, n_answers, choices_K)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        assert model(idx).shape[1] == 32  # nothing is left hooked


def test_training_and_measuring_share_no_example():
    def whole(split: str, task: str, length: int, n: int) -> set[bytes]:
        return {example(task, 1, split, i, length, "bytes").tokens.tobytes() for i in range(n)}

    for task in TASKS:
        assert len(whole("eval", task, 64, 300)) == 300
        assert not whole("eval", task, 64, 300) & (whole("train", task, 64, 2000) | whole("val", task, 64, 300))


@unhurried
@given(st.integers(SHORTEST, 200), indices)
def test_a_block_is_whole_examples_of_exactly_the_training_length(length, index):
    parts = block(["copy", "passkey"], 1, "train", index, length, "bytes")
    assert sum(map(len, parts)) == length and all(part[0] == 256 and len(part) >= SHORTEST for part in parts)
    for part in parts:
        text = bytes(part[1:].tolist()).decode()
        half = text.partition("|")[0]
        assert text.endswith("|" + half) or text[-5:] == solve("passkey", text[:-5], 5)


def test_depths_are_spread_and_binned():
    depths = [example("passkey", 1, "eval", i, 128, "bytes").depth for i in range(400)]
    found = tasks.by_depth(torch.tensor([float(d < 0.4) for d in depths]), depths)
    assert [one["n"] > 50 for one in found] == [True] * 5 and sum(one["n"] for one in found) == 400
    assert [one["accuracy"] for one in found] == pytest.approx([1, 1, 0, 0, 0], abs=0.02)
    assert tasks.by_depth(torch.ones(1), [0.5])[0] == {"from": 0, "to": 0.2, "accuracy": None, "stderr": None, "n": 0}


def write(folder, *words: object):
    """A folder of examples to train on, as the command writes it."""
    done = run_command("lab.analyze", "tasks", "--write_shards", folder, "--tokenizer", "bytes", *words)
    assert done.returncode == 0, done.stderr
    assert f"--data={folder} --block_size={words[1]}" in done.stdout
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tasks") / "data", "--length", 48, "--tokens", 40_000, "--tasks", "copy", "counting")


def test_shards_are_rows_of_whole_examples(shards):
    manifest = read_manifest(shards)
    assert (manifest["tokenizer"], manifest["n_vocab"], manifest["tasks"]) == ("bytes", 257, ["copy", "counting"])
    sizes = {}
    for split in ("train", "val"):
        (path,) = find_shards(shards, split)
        rows = np.asarray(open_shard(path)).reshape(-1, 48)
        assert (rows[:, 0] == 256).all()
        sizes[split] = rows.size
        for i, row in enumerate(rows[:30]):
            assert np.array_equal(row, np.concatenate(block(["copy", "counting"], 1, split, i, 48, "bytes")))
    assert sizes == {"train": 40_000 // 48 * 48, "val": 2_000 // 48 * 48}
    assert manifest["documents"] == sum(int((open_shard(path) == 256).sum()) for path in shards.glob("*.bin"))


def run_of(encoding: str, data, out, **options) -> None:
    """A small run at length 32, named after its encoding."""
    words = {
        "data": data, "out_dir": out, "name": encoding, "encoding": encoding, "device": "cpu", "dtype": "float32", "n_layer": 1,
        "n_head": 2, "n_embd": 32, "vocab_size": 320, "block_size": 32, "micro_batch": 64, "tokens_per_step": 2048, "steps": 2,
        "warmup_steps": 0, "lr": 1e-2, "min_lr": 1e-3, "final_eval_tokens": 2048,
    } | options  # fmt: skip
    train(load_config([f"--{key}={value}" for key, value in words.items()]))


def measured(folder) -> dict[str, dict]:
    """What the command wrote: encoding → (task, factor) → record."""
    found = json.loads((folder / "tasks.json").read_text())
    assert {"command", "git", "date", "seed", "runs"} <= set(found)
    return {one["encoding"]: {(r["task"], r["factor"]): r for r in one["results"]} for one in found["runs"]}


@pytest.mark.slow
def test_a_run_trained_on_them_does_better_than_a_guess(tmp_path):
    data = write(tmp_path / "data", "--length", 16, "--tokens", 200_000, "--tasks", "copy")
    run_of("rope", data, tmp_path, block_size=16, steps=240, warmup_steps=10)
    words = ["--examples", 200, "--factors", 1, 4, "--tasks", "copy", "--device", "cpu", "--out", tmp_path]
    done = run_command("lab.analyze", "tasks", tmp_path / "rope", *words)
    assert done.returncode == 0, done.stderr
    near, far = measured(tmp_path)["rope"].values()
    assert near["accuracy"] > 0.3 and near["nll"] < math.log(26) - 1 and near["stderr"] < 0.1
    assert far["accuracy"] < near["accuracy"] / 2  # it has only seen copies eight tokens away


def test_the_command_and_its_files(runs, corpus, tmp_path):
    for encoding in ("rope", "alibi"):
        run_of(encoding, corpus, tmp_path)
    paths = [tmp_path / "rope", runs / "learned", runs / "carope", tmp_path / "alibi"]
    done = run_command("lab.analyze", "tasks", *paths, "--examples", 8, "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found, factors = measured(tmp_path), (1, 2, 4, 8, 16)
    assert list(found) == ["rope", "learned", "carope", "alibi"]
    assert all(list(one) == [(task, factor) for task in TASKS for factor in factors] for one in found.values())
    for encoding, one in found.items():
        for (task, factor), r in one.items():
            assert r["length"] == 32 * factor and r["chance"] == 1 / len(TASKS[task].choices)
            if encoding == "learned" and factor > 1:
                assert r["accuracy"] is r["stderr"] is r["nll"] is r["exact"] is None and r["n"] == 0
                continue
            assert 0 <= r["exact"] <= r["accuracy"] <= 1 and r["nll"] > 0 and r["stderr"] >= 0 and r["n"] == 8
            assert r["answers"] == {"copy": 16 * factor - 1, "passkey": 5}.get(task, 1)
            assert ("by_depth" in r) == (task in ("induction", "passkey"))
            assert sum(one["n"] for one in r.get("by_depth", [{"n": 8}])) == 8
    assert "learned" in done.stdout and done.stdout.count("–") == 4 * 4
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no RUN: name runs to measure, or with --write_shards a folder"),
        (["nowhere"], "nowhere: no such run folder"),
        (["RUN", "--write_shards", "new"], "takes no RUN"),
        (["RUN", "--length", 64], "--length: says what --write_shards writes"),
        (["RUN", "--factors", 0], "--factors = 0: must be at least 1"),
        (["RUN", "--examples", 1], "--examples = 1: must be at least 2"),
        (["--write_shards", "new", "--seed", -1], "--seed = -1: must be at least 0"),
        (["--write_shards", "new", "--length", 15], "--length = 15: must be at least 16"),
        (["--write_shards", "new", "--length", 64, "--tokens", 63], "--tokens = 63: must be at least one window"),
        (["--write_shards", "SHARDS"], "holds shards already"),
    ],
)
def test_a_mistake_is_one_line(words, message, runs, shards, tmp_path, monkeypatch, capsys):
    places = {"RUN": runs / "learned", "SHARDS": shards, "new": tmp_path / "new", "nowhere": "nowhere"}
    monkeypatch.setattr(sys, "argv", ["lab.analyze", "tasks", *(str(places.get(word, word)) for word in words)])
    with pytest.raises(SystemExit) as leave:
        analyze.main()
    said = capsys.readouterr().err
    assert leave.value.code == 2 and said.count("\n") == 1 and message in said
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_without_the_tasks_letters_is_refused(runs, tmp_path, monkeypatch):
    model, state, folder = tasks.load_model(runs / "learned")
    odd = state.model_copy(update={"tokenizer": "gpt2"})
    monkeypatch.setattr(tasks, "load_model", lambda path: (model, odd, folder))
    args = SimpleNamespace(factors=[1], tasks=["copy"], examples=2, seed=1)
    with pytest.raises(UserError, match=r"'gpt2' \(50257 ids\); it has 'gpt2' and vocab_size = 320"):
        tasks.measure_run("it", args, None)


def test_runs_of_several_seeds_become_one_line():
    def one(encoding: str, near: float, far: float | None) -> dict:
        pairs = ((1, near), (2, far))
        results = [{"task": "copy", "factor": f, "chance": 0.1, "accuracy": a, "stderr": a and 0.03, "n": 9} for f, a in pairs]
        return {"run": f"{encoding}-{near}", "encoding": encoding, "block_size": 32, "results": results}

    found = {"runs": [one("rope", 0.5, 0.25), one("learned", 1.0, None), one("rope", 0.7, 0.25)]}
    rope, learned = findings.merge_seeds(found)
    assert [r["accuracy"] for r in rope["results"]] == pytest.approx([0.6, 0.25]) and rope["n"] == 2
    assert [r["stderr"] for r in rope["results"]] == pytest.approx([0.1, 0.0])
    assert [r["stderr"] for r in learned["results"]] == [0.03, None] and learned["n"] == 1
    text = findings.render_tasks(found)
    assert "| copy (a guess: 0.10) | rope | 0.60 ± 0.10 | 0.25 ± 0.00 | 2 |\n| | learned | 1.00 ± 0.03 | – | 1 |\n" in text
    assert "of a single run over its 9 examples" in text


def test_the_results_in_the_findings_say_where_they_come_from():
    found = findings.result("tasks")
    assert {"command", "git", "date", "trained"} <= set(found) and "dirty" not in found["git"] + json.dumps(found["trained"])
