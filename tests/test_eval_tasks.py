"""lab.eval_tasks: the real harness on a local task, against the same choices by our own model."""

import json
import sys

import pytest
import torch
from conftest import run_command
from test_export import saved

from lab import eval_tasks

TASK = """task: local_bytes
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
validation_split: validation
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
WORDS = ["the", "class", "returns", "a", "new", "value", "of", "this", "type", "when", "given", "no", "other", "name"]
DOCS = [
    {
        "text": f"{WORDS[i % 14]} {WORDS[i * 5 % 14]}",
        "choices": [f" {WORDS[(i + j * 3) % 14]}" for j in range(4)],
        "label": i % 4,
    }
    for i in range(40)
]


def our_accuracy(model) -> float:
    """Share of questions whose likeliest choice, by its bytes' log-probabilities, is the right one."""
    right = 0
    for doc in DOCS:
        scores = []
        for choice in doc["choices"]:
            context, rest = doc["text"].encode(), choice.encode()
            idx = torch.tensor([[*context, *rest]])
            with torch.no_grad():
                log_p = model(idx)[0, :, :257].log_softmax(-1)
            scores.append(log_p[range(len(context) - 1, idx.size(1) - 1), list(rest)].sum().item())
        right += max(range(4), key=scores.__getitem__) == doc["label"]
    return right / len(DOCS)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["carope", "rope"])
def test_the_harness_finds_the_accuracy_that_our_model_has(tmp_path, encoding):
    pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")
    model = saved(tmp_path / "run", encoding)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tasks / "local_bytes.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = ["--tasks", "local_bytes", "--include_path", tasks, "--json", tmp_path / "tasks.json", "--batch", 8]
    done = run_command("lab.eval_tasks", tmp_path / "run", *words, "--device", "cpu", env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads((tmp_path / "tasks.json").read_text())
    assert (result["encoding"], result["step"], result["n"]) == (encoding, 3, {"local_bytes": 40})
    assert result["tasks"]["local_bytes"]["acc"] == pytest.approx(our_accuracy(model))
    assert "local_bytes  acc  " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch=0"], "--batch = 0: must be at least 1"),
        ([], "lm_eval is not installed; pip install -e '.[eval]'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["lab.eval_tasks", str(tmp_path), "--tasks=piqa", *words])
    with pytest.raises(SystemExit, match="2"):
        eval_tasks.main()
    assert capsys.readouterr().err == f"error: {message}\n"
