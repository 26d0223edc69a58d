"""docs/: what the pages name is there, the table of reproduce.md is the model's. Their commands run in test_pages.py."""

import re

import pytest
from conftest import ROOT

PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_link_is_there(page):
    text = PAGES[page]
    for path in re.findall(r"`((?:tests|results|scripts|config|docs)/[\w/.]+\w)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / "docs" / link).resolve().exists(), link


def test_the_predicted_table_is_the_models():
    from lab.pages.scaling import blocks

    assert "15.0 h on two H200s, predicted" in PAGES["reproduce"] and "15.0 h | 29.9" in blocks()["table1"]
