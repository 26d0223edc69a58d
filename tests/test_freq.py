"""lab.analyze freq: what kinds of tokens there are, and f by them."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lab.analyze.__main__ as analyze
from core.config import load_config
from core.errors import UserError
from lab.analyze import freq, freq_figures
from lab.analyze.frequencies import collect
from lab.analyze.token_classes import CLASSES, classify
from model import GPT
from text.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_a_token_has_the_class_of_its_word(name):
    tokenizer = load_tokenizer(name)
    text = "It’s Ann's dog — can't, 3.14 of the “cafés”.\n"
    ids = [tokenizer.eot, *tokenizer.encode(text).tolist()] * 2
    found: dict[str, bytes] = {}
    for token, k in zip(ids, classify(ids, tokenizer), strict=True):
        found[CLASSES[k]] = found.get(CLASSES[k], b"") + tokenizer.decode_bytes([token])
    squeezed = {name: piece.decode().replace(" ", "") for name, piece in found.items()}
    assert squeezed == {
        "start of document": "<|endoftext|>" * 2, "function words": "It’scan'tofthe" * 2, "content words": "Ann'sdogcafés" * 2,
        "punctuation": "—,“”." * 2, "digits": "3.14" * 2, "white space": "\n\n",
    }  # fmt: skip
    assert found["white space"].count(b" ") == (2 * 8 if name == "bytes" else 0)  # GPT-2's words bring theirs along


def test_classes_do_not_depend_on_where_a_token_is_cut():
    gpt2, text = load_tokenizer("gpt2"), "The unbelievably long word: 1234567 is hers."
    ids = gpt2.encode(text).tolist()
    of_byte = classify(load_tokenizer("bytes").encode(text).tolist(), load_tokenizer("bytes"))
    at = 0
    for token, k in zip(ids, classify(ids, gpt2), strict=True):
        own = {*of_byte[at : at + len(gpt2.decode_bytes([token]))].tolist()} - {CLASSES.index("white space")}
        assert own == {k}
        at += len(gpt2.decode_bytes([token]))


def test_statistics_by_hand():
    f_LHWT = np.array([[[[0.2, 0.4, 0.2, 0.4], [0.2, 0.4, 0.2, 0.4]], [[0.5] * 4] * 2]], dtype=np.float32)
    found = freq.statistics(f_LHWT, np.array([0, 3] * 4), [None], theta=0.1)
    first, second = found["heads"]
    assert first["mean"] == pytest.approx(0.3) and first["std"] == pytest.approx(0.1) and not first["collapsed"]
    assert first["class_share"] == pytest.approx(1) and first["classes"]["content words"]["mean"] == pytest.approx(0.4)
    assert second["collapsed"] and second["class_share"] is None
    by_n = {p["n"]: p["mean"] for p in first["phase_distance"]}
    assert by_n == pytest.approx({1: (0.4 + 0.2 + 0.4) / 3, 2: 0.6})  # the f of the later token counts, not of the earlier
    assert [p["rope"] for p in found["phase_distance"]] == pytest.approx([0.1, 0.2])
    assert found["class_tokens"]["punctuation"] == found["class_tokens"]["content words"] == 4


def test_f_is_what_every_layer_sees():
    words = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--vocab_size=320", "--block_size=32", "--tokens_per_step=1024"]
    model, idx = GPT(load_config([*words, "--encoding=carope_hidden"])).eval(), torch.arange(40)[None]
    with torch.no_grad():
        for one in model.encodings:
            one.W.weight.normal_(generator=torch.Generator().manual_seed(1))
        x_BTC, f_LBHT = model.wte(idx), collect(model, idx)
        torch.testing.assert_close(f_LBHT[0], model.encodings[0].frequency(model.h[0].ln_1(x_BTC)))
    assert not torch.equal(f_LBHT[0], f_LBHT[1]) and all(one.kernel is None for one in model.encodings)


def test_the_command_and_its_files(runs, tmp_path, monkeypatch):
    words = ["--text", "Of <b> & 12 ü\n", "--out", tmp_path, "--max_tokens", 2000, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lab.analyze", "freq", *map(str, (runs / "carope", *words))])
    with pytest.raises(SystemExit) as done:
        analyze.main()
    assert not done.value.code
    found = json.loads((tmp_path / "freq.json").read_text())
    assert found["tokens"] == 2000 // 32 * 32 == sum(found["class_tokens"].values())
    assert [head["head"] for head in found["heads"]] == [0, 1] and all(head["layer"] is None for head in found["heads"])
    assert all(0 < head["mean"] < 1 and 0 <= head["class_share"] <= 1 for head in found["heads"])
    assert "".join(found["text"]["tokens"]).startswith("¶Of <b> & 12 ")
    for name in ("freq.png", "freq_text.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "freq.html").read_text()
    assert "&lt;</span>" in page and "&amp;</span>" in page and "<b>" not in page and "http" not in page


def test_colors_and_lines():
    assert freq_figures.color(0) == "#ffffff" and freq_figures.color(9) == freq_figures.color(2.5) != freq_figures.color(-9)
    places, lines = freq_figures.layout(["word"] * 1000)
    assert len(places) == freq_figures.SHOWN // 4 and lines == math.ceil(freq_figures.SHOWN / freq_figures.COLUMNS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"runs": ["learned"]}, "'learned' has no f"),
        ({"runs": ["carope", "learned"]}, "one run at a time"),
        ({"max_tokens": 1}, "must be at least 2"),
        ({"text": ""}, "--text: 0 tokens; must be from 1 to 4095"),
    ],
)
def test_refusals(runs, tmp_path, words, message):
    given = {"runs": ["carope"], "text": "A", "max_tokens": 500, "device": "cpu", "data": None} | words
    given["runs"] = [str(runs / name) for name in given["runs"]]
    with pytest.raises(UserError, match=message):
        freq.run(SimpleNamespace(**given), tmp_path)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        *((name, f"'{name}' has one f for all tokens and heads, the constant 0.5623") for name in ("rope", "carope_frozen")),
        *(
            (name, f"'{name}' has no f;")
            for name in ("hope", "darope", "fope", "selective_rope", "grape_m", "grape_m_ctx", "pope")
        ),
    ],
)
def test_encodings_of_one_constant_are_refused(encoding, message):
    words = [f"--encoding={encoding}", "--n_layer=1", "--n_head=1", "--n_embd=32", "--vocab_size=320", "--block_size=32"]
    with pytest.raises(UserError, match=message):
        freq.check(GPT(load_config([*words, "--tokens_per_step=1024"])), "runs/x")
