"""Results of evaluations: all that decides a number is in its record, and no record is taken for another's answer."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file

from core.checkpoint import MODEL, OPTIMIZER, find_checkpoint, write_checkpoint
from core.distributed import Distributed
from core.files import write_json
from core.results import FIELDS, Question, beside, closing, render, special
from core.upload import summary_key
from eval_ppl import evaluate_run
from lab.export_hf.card import read_evaluations
from lab.report.data import read_run

ASKED = Question(
    length=64, stride=64, max_tokens=0, min_document_tokens=None, rope_scaling=None, scale=None, dtype="float32",
    weights="a" * 64, data_sha256=["b" * 64], source="c" * 64,
)  # fmt: skip
OTHER = {
    "length": 32, "stride": 8, "max_tokens": 100, "min_document_tokens": 10, "rope_scaling": "ntk", "scale": 8.0,
    "dtype": "bfloat16", "weights": "d" * 64, "data_sha256": ["b" * 64, "e" * 64], "source": "f" * 64,
}  # fmt: skip


def cpu() -> Distributed:
    return Distributed(torch.device("cpu"), torch.float32)


def like(run: Path, out: Path, fill: float | None = None, **state: object) -> Path:
    """A run folder like `run`, whose checkpoint has another state, and for weights `fill` in the last norm's place."""
    checkpoint, found = find_checkpoint(run)
    weights, optimizer = load_file(checkpoint / MODEL), load_file(checkpoint / OPTIMIZER)
    if fill is not None:
        weights["ln_f.weight"].fill_(fill)
    write_checkpoint(out, {MODEL: weights, OPTIMIZER: optimizer}, found.model_copy(update=state))
    return out


@pytest.mark.parametrize("field", FIELDS)
def test_a_result_that_differs_in_anything_is_no_answer(field):
    result = json.loads(json.dumps({"perplexity": 7.0, "run": "r"} | asdict(ASKED)))
    assert ASKED.answer([{}, result]) is result
    assert ASKED.answer([result | {field: OTHER[field]}]) is None
    assert ASKED.answer([{key: value for key, value in result.items() if key != field}]) is None or result[field] is None
    assert len(beside([result], [result | {field: OTHER[field]}, result, result | {"run": "s"}])) == 3


def test_what_is_special_has_another_name():
    for field, words in {
        "stride": ["stride 8"], "max_tokens": ["first 100"], "min_document_tokens": ["documents 10"], "dtype": ["bfloat16"],
        "data_sha256": ["other data"], "weights": [], "source": [],
    }.items():  # fmt: skip
        assert special(replace(ASKED, **{field: OTHER[field]}), ASKED) == words
    scaled = special(replace(ASKED, rope_scaling="yarn", scale=4.0, stride=16), ASKED)
    assert summary_key({"length": 64, "special": scaled}) == "perplexity/64/yarn4/stride16"
    assert summary_key({"length": 64, "special": special(ASKED, ASKED)}) == "perplexity/64"


SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--steps=4", "--warmup_steps=1", "--eval_tokens=500", "--final_eval_tokens=500",
    "--micro_batch=4", "--tokens_per_step=256", "--device=cpu",
]  # fmt: skip
EVALUATED_OTHERWISE = {
    "scaled": ["--rope_scaling", "ntk", "--scale", "8"],
    "slid": ["--stride", "16"],
    "bfloat16": ["--dtype", "bfloat16"],
    "documents": ["--documents", "300"],
    "other data": ["--data", "{other}"],
}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another evaluation set by the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "data"
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("The sea was calm, and the ship lay still. " * 300)
    done = run_command("prepare_fineweb.py", "--source", text, "--tokenizer", "bytes", "--out", folder, "--val_tokens", 3000)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_tables_take_no_other_evaluation_for_theirs(corpus, other, tmp_path):
    """Whatever lies in eval.json, where the documents tell users to put it."""
    common = ["--lengths", "64", "128", "--max_tokens", "2000", f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]
    table = ["table1.py", "--sizes", "demo", "--encodings", "rope", *common]
    lab = ["lab.sweep", "config/demo.toml", "--encodings", "rope", "--seeds", "1", *common]

    def numbers(words: list[str], out: Path) -> list[float]:
        done = run_command(*words)
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        return [r["nll"] for r in (found if isinstance(found, list) else found["runs"])]

    def evaluated(run: str, *words: str) -> None:
        run_folder = tmp_path / run
        words = tuple(word.format(other=other) for word in words)
        done = run_command("eval_ppl.py", run_folder, *common[:5], *words, "--json", run_folder / "eval.json")
        assert done.returncode == 0, done.stderr

    ours = numbers(table, tmp_path / "table1.json")
    assert ours == numbers([*lab, "--json", str(tmp_path / "one.json")], tmp_path / "one.json")
    first, *rest = EVALUATED_OTHERWISE.values()
    evaluated("demo-rope", *first)  # in place of all
    for words in rest:
        evaluated("demo-rope", *words, "--append")
    there = json.loads((tmp_path / "demo-rope/eval.json").read_text())
    assert len({r["nll"] for r in there} | set(ours)) == len(there) + len(ours)
    assert numbers(table, tmp_path / "table1.json") == ours
    assert numbers([*lab, "--json", str(tmp_path / "two.json")], tmp_path / "two.json") == ours
    after = json.loads((tmp_path / "demo-rope/eval.json").read_text())
    assert after[: len(there)] == there and [r["nll"] for r in after[len(there) :]] == ours  # and nothing is lost

    page = {variant.special: variant.by_length for variant in read_run(tmp_path / "demo-rope").variants}
    limit = "first 2000"
    assert set(page) == {(limit,), ("ntk 8", limit), (limit, "bfloat16"), ("documents 300", limit), (limit, "other data")} | {
        ("stride 16", limit)
    }
    assert [r["nll"] for r in page[limit,].values()] == ours
    _, state = find_checkpoint(tmp_path / "demo-rope")
    assert [r["nll"] for r in read_evaluations(tmp_path / "demo-rope", state)] == ours


def test_a_run_trained_again_is_evaluated_again(corpus, tmp_path):
    table = ["--lengths", "64", "--max_tokens", "2000", f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]
    table = ["table1.py", "--sizes", "demo", "--encodings", "rope", *table]
    assert run_command(*table).returncode == 0
    (before,) = json.loads((tmp_path / "table1.json").read_text())
    (tmp_path / "demo-rope/checkpoints").rename(tmp_path / "old")  # eval.json stays
    again = run_command(*table, "--lr=1e-2")
    assert again.returncode == 0, again.stderr
    (after,) = json.loads((tmp_path / "table1.json").read_text())
    assert after["step"] == before["step"] and abs(after["nll"] - before["nll"]) > 1e-3
    record = read_run(tmp_path / "demo-rope")
    assert [r["nll"] for v in record.variants for r in v.by_length.values()] == [after["nll"]]
    assert any("of other weights" in note for note in record.notes)


def test_another_evaluation_set_in_the_same_folder_is_refused(corpus, other, tmp_path):
    data = tmp_path / "data"
    data.symlink_to(corpus)
    table = ["--lengths", "64", "--max_tokens", "2000", f"--data={data}", f"--out_dir={tmp_path}", *SCALE]
    table = ["table1.py", "--sizes", "demo", "--encodings", "rope", *table]
    assert run_command(*table).returncode == 0
    data.unlink()
    data.symlink_to(other)
    kept = run_command(*table)  # it is evaluated already
    assert kept.returncode == 0, kept.stderr
    table[table.index("64")] = "32"
    done = run_command(*table)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "its evaluation set is not the one" in done.stderr and "--data says where that is" in done.stderr


def test_append_keeps_what_is_there_and_refuses_what_is_no_result(runs, tmp_path):
    words = ["eval_ppl.py", runs / "carope", "--max_tokens", "500", "--device", "cpu", "--json", tmp_path / "a.json"]
    for lengths in (["16"], ["32", "16"], ["16"]):
        assert run_command(*words, "--append", "--lengths", *lengths).returncode == 0
    assert [r["length"] for r in json.loads((tmp_path / "a.json").read_text())] == [32, 16]
    (tmp_path / "a.json").write_text('{"mine": 1}')
    done = run_command(*words, "--append", "--lengths", "16")
    assert done.returncode == 2 and "holds no results of eval_ppl.py" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "a.json").read_text() == '{"mine": 1}'
    assert "goes with --json" in run_command("eval_ppl.py", runs / "carope", "--append").stderr


def test_the_number_format_is_the_trainings_own(runs, tmp_path):
    _, state = find_checkpoint(runs / "carope")
    assert state.dtype == "float32"
    trained_on_a_gpu = like(runs / "carope", tmp_path / "gpu", dtype="bfloat16", config=state.config | {"dtype": "auto"})
    (asked,) = evaluate_run(trained_on_a_gpu, [32], cpu(), max_tokens=500)
    (by_hand,) = evaluate_run(runs / "carope", [32], cpu(), max_tokens=500, dtype="bfloat16")
    assert asked["dtype"] == by_hand["dtype"] == "bfloat16" and asked["nll"] == by_hand["nll"]
    assert (asked["special"], by_hand["special"]) == (["first 500"], ["first 500", "bfloat16"])


def test_weights_that_are_no_numbers_are_an_error_and_leave_no_file(runs, tmp_path):
    broken = like(runs / "carope", tmp_path / "broken", fill=math.nan)
    done = run_command(
        "eval_ppl.py", runs / "carope", broken, "--lengths", "32", "--max_tokens", "500", "--device", "cpu",
        "--json", tmp_path / "a",
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "loss at length 32 is nan, as ln_f.weight is not finite everywhere" in done.stderr
    assert [r["run"] for r in json.loads((tmp_path / "a").read_text())] == ["carope"]  # what was evaluated before is kept


def test_json_has_no_numbers_that_only_python_reads(tmp_path):
    write_json(tmp_path / "a", {"a": [1.5, math.nan, (math.inf, True)], "b": {"c": -math.inf, "d": "NaN"}})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "a").read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None, [None, True]], "b": {"c": None, "d": "NaN"}}


def test_an_unfinished_run_says_so_in_the_table(runs, tmp_path):
    _, state = find_checkpoint(runs / "carope")
    half = like(runs / "carope", tmp_path / "half", config=state.config | {"steps": 60, "name": "half"})
    results = [r for run in (half, runs / "carope") for r in evaluate_run(run, [32], cpu(), max_tokens=500)]
    _, first, second = render(results).splitlines()
    assert first.split()[:5] == ["half", "carope", "30", "of", "60"] and second.split()[:3] == ["carope", "carope", "30"]
    assert closing(results, None, "cpu").splitlines()[1:] == [
        "± is each run's own; the difference of two runs on the same tokens is known better than it says",
        "not trained to the end: half",
    ]
    assert len(closing(results[1:], None, "cpu").splitlines()) == 1


def test_code_that_changed_since_the_training_is_named(runs, tmp_path, capsys):
    changed = like(runs / "carope", tmp_path / "changed", source="syntax:" + "0" * 64, git="1234567890abcdef")
    evaluate_run(changed, [32], cpu(), max_tokens=100)
    said = capsys.readouterr().err
    assert "encoding 'carope' is not what it was: its code has changed; commit 1234567890 has what it was trained by" in said
    evaluate_run(runs / "carope", [32], cpu(), max_tokens=100)
    evaluate_run(like(runs / "carope", tmp_path / "old", source="0" * 64), [32], cpu(), max_tokens=100)  # of whole files
    assert capsys.readouterr().err == ""
