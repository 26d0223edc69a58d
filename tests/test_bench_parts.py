"""lab.bench decode at toy sizes: what the last line holds, and that it holds together."""

import json

import pytest
from conftest import run_command

TOY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=320", "--block_size=32", "--device=cpu", "--dtype=float32"]
SHORT = ["--early", 5, "--late", 40, "--tokens", 12, "--stride", 4, "--batch", 3, "--rounds", 3]
pytestmark = pytest.mark.slow


def last_line(*words: object) -> dict:
    done = run_command("lab.bench", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def consistent(figures: dict, tokens: int, n: int) -> bool:
    """Whether a spread says of itself what it must."""
    rate = figures["tokens_per_second"] * figures["ms_median"] / 1e3
    return (
        figures["n"] == n and figures["ms_p10"] <= figures["ms_median"] <= figures["ms_p90"] and abs(rate / tokens - 1) < 0.02
    )


def test_decoding_with_several_encodings():
    found = last_line("decode", *TOY, *SHORT, "--encodings", "carope", "learned", "rope")
    assert {"tokens_per_second", "ms_median", "ms_p10", "ms_p90", "encoding", "config", "device", "git"} <= set(found)
    assert [one["encoding"] for one in found["encodings"]] == ["carope", "learned", "rope"] and found["encoding"] == "carope"
    for one in found["encodings"]:
        assert consistent(one["cached"], 12, 3) and consistent(one["batched"], 3 * 12, 3) and consistent(one["uncached"], 12, 3)
        assert consistent(one["early"], 8, 3) and consistent(one["late"], 8, 3)
        assert one["ms_per_token"]["late"] == pytest.approx(one["late"]["ms_median"] / 8, abs=1e-3)
        assert one["late_over_early"] > 0 and one["cache_speedup"] > 0 and one["batch_speedup"] > 0
    assert found["tokens_per_second"] == found["encodings"][0]["cached"]["tokens_per_second"]


def test_decoding_with_a_run(runs):
    found = last_line("decode", runs / "carope", *SHORT)
    assert found["encoding"] == "carope" and found["config"]["name"] == "carope" and found["config"]["vocab_size"] == 320


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode", *TOY, "--encodings", "rpoe"], "encoding = 'rpoe': did you mean rope?"),
        (["decode", *TOY, "--rounds", "0"], "--rounds: 0 is not a whole number above 0"),
        (["decode", "{runs}/carope", "--encodings", "rope"], "a run has its encoding and its options; leave out rope"),
        (["decode", "{runs}/learned"], "encoding 'learned' has positions for 32 only, 1008 are wanted"),
        (["decode", "{runs}"], "no valid checkpoint"),
    ],
)
def test_mistakes_are_one_line(runs, words, message):
    done = run_command("lab.bench", *(word.format(runs=runs) for word in words))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].count(message) == 1
