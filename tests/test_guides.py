"""docs/reproduce.md and docs/faq.md: the scripts take their commands, their files are there, their table is the model's."""

import re
import shlex

import pytest
from conftest import ROOT, run_command

import prepare_fineweb
from config import load_config

PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("reproduce", "faq")}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("python", "torchrun"))]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_the_script_takes(words, capsys):
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[at], words[at + 1 :]
    if script == "prepare_fineweb.py":
        prepare_fineweb.parse_args(rest)
    elif script == "train.py":
        load_config([word for word in rest if word != "--print_config"])
    else:
        usage = run_command(script, "--help").stdout
        assert all(word in usage for word in rest if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_link_is_there(page):
    text = PAGES[page]
    for path in re.findall(r"`((?:tests|results|scripts|config|docs)/[\w/.]+\w)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / "docs" / link).resolve().exists(), link


def test_the_predicted_table_is_the_models():
    from benchmarks.scaling_report import blocks

    assert f"<!-- table1 -->\n{blocks()['table1']}<!-- end -->" in PAGES["reproduce"]
    assert "15.4 h on two H100s, predicted" in PAGES["reproduce"] and "15.4 h | 30.8" in blocks()["table1"]
