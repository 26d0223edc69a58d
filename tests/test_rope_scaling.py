"""Context extension without training: the factors are those of transformers, and eval_ppl.py applies them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_positional import build, tokens
from test_rotary import moved_alike

import eval_ppl
from core.cache import KVCache
from core.checkpoint import load_model
from core.data import TokenStream
from core.distributed import Distributed
from core.errors import UserError
from eval_ppl import evaluate_run, render
from positional import ENCODINGS
from positional.scaling import SCALINGS, rescale

CPU = Distributed(torch.device("cpu"), torch.float32)
SHAPES = [(64, 10000.0, 512, 4.0), (16, 10000.0, 32, 2.0), (128, 500000.0, 8192, 1.5), (64, 10000.0, 2048, 32.0)]


def theirs(kind: str, width: int, base: float, original: int, scale: float, length: int) -> tuple[np.ndarray, float]:
    """Frequencies and magnitude as transformers computes them; NTK-aware, which it lacks, as RoPE of the larger base."""
    if kind == "ntk":
        larger = base * scale ** (width / (width - 2))
        return np.array([larger ** (-2 * i / width) for i in range(width // 2)]), 1.0
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    given = {"rope_type": kind, "factor": scale, "rope_theta": base, "original_max_position_embeddings": original}
    config = SimpleNamespace(hidden_size=0, num_attention_heads=1, head_dim=width, max_position_embeddings=original)
    config.rope_parameters, config.standardize_rope_params = given, lambda: None
    found, magnitude = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return found.double().numpy(), magnitude


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(("width", "base", "original", "scale"), SHAPES)
def test_frequencies_are_those_of_transformers(kind, width, base, original, scale):
    for length in (original // 2, original, 2 * original, int(scale * original)):
        ours = SCALINGS[kind](scale, original)
        theta = base ** (-2 / width)
        frequencies = ours.factors(theta, width // 2, length).numpy() * theta ** np.arange(width // 2)
        expected, magnitude = theirs(kind, width, base, original, scale, length)
        np.testing.assert_allclose(frequencies, expected, rtol=2e-5)
        assert ours.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_turns_by_the_scaled_frequencies(kind):
    model = build("rope")
    rescale(model.encodings, "rope", SCALINGS[kind](4, 32))
    cos, sin = model.wpe(torch.zeros(1, 100, 32), torch.arange(100)).frame
    frequencies, magnitude = theirs(kind, 16, 10000.0, 32, 4.0, 100)
    angles = np.arange(100)[:, None] * frequencies
    np.testing.assert_allclose(cos[0, 0].numpy(), magnitude * np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin[0, 0].numpy(), magnitude * np.sin(angles), atol=1e-4)


@pytest.mark.parametrize("encoding", ["carope", "carope_hidden", "carope_scalar"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_what_starts_as_rope_is_scaled_as_rope(encoding, kind):
    rope, ours = moved_alike("rope", encoding, also=("--block_size=64", "--tokens_per_step=64", "--micro_batch=1"))
    idx = tokens(200, batch=1)
    with torch.no_grad():
        before = rope(idx)
        for model in (rope, ours):
            rescale(model.encodings, "", SCALINGS[kind](3, 64))
        torch.testing.assert_close(ours(idx), rope(idx), atol=1e-4, rtol=0)
        assert (rope(idx) - before).abs().max() > 0.1
        rescale(rope.encodings, "", None)
        assert torch.equal(rope(idx), before)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scale_of_one_changes_nothing_and_dynamic_nothing_up_to_the_training_length(kind):
    model, idx = build("carope"), tokens(32)
    with torch.no_grad():
        before = model(idx)
        rescale(model.encodings, "carope", SCALINGS[kind](8 if kind == "dynamic" else 1, 32))
        torch.testing.assert_close(model(idx), before, atol=1e-6, rtol=0)  # cosines in another type


def test_ntk_of_carope_is_a_smaller_f():
    model, x = build("carope"), torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(1))
    f_BHT = model.wpe.frequency(x).double()
    rescale(model.encodings, "carope", SCALINGS["ntk"](4, 32))
    cos, _ = model.wpe(x, torch.arange(50)).frame
    smaller_BHTF = (f_BHT * 4 ** (-1 / 7))[..., None] ** torch.arange(8)
    torch.testing.assert_close(cos.double(), smaller_BHTF.cumsum(-2).cos(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SCALINGS)
def test_decoding_with_a_cache_is_scaled_too_or_refused(kind):
    for encoding in ("rope", "carope_hidden", "partial_rope"):
        model, idx, cache = build(encoding), tokens(60), KVCache()
        rescale(model.encodings, encoding, SCALINGS[kind](2, 32))
        with torch.no_grad():
            if SCALINGS[kind].dynamic:
                with pytest.raises(ValueError, match="cannot be cached; use 'ntk'"):
                    model(idx, cache=cache)
                continue
            pieces = [model(idx[:, :50], cache=cache), model(idx[:, 50:], cache=cache)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_what_does_not_turn_by_phases_is_refused(encoding):
    model = build(encoding)
    if encoding.startswith("carope") or encoding in ("rope", "rope_bf16pos", "partial_rope", "hope"):
        rescale(model.encodings, encoding, SCALINGS["yarn"](2, 32))
        assert all(one.kernel is None and one.scaling for one in model.encodings)
    else:
        with pytest.raises(ValueError, match=f"encoding {encoding!r} does not turn"):
            rescale(model.encodings, encoding, SCALINGS["yarn"](2, 32))


def test_evaluation_is_of_the_scaled_model(runs, corpus):
    options = {"max_tokens": 600, "rope_scaling": "yarn", "scale": 2.0}
    (plain,) = evaluate_run(runs / "carope", [128], CPU, max_tokens=600)
    (scaled,) = evaluate_run(runs / "carope", [128], CPU, **options)
    assert (plain["rope_scaling"], plain["scale"]) == (None, None)
    assert (scaled["rope_scaling"], scaled["scale"]) == ("yarn", 2.0)
    model, _, _ = load_model(runs / "carope")
    rescale(model.encodings, "carope", SCALINGS["yarn"](2.0, 32))  # 32 is what the run was trained at
    nll = []
    text = TokenStream(corpus, "val", 320).read(0, 601).astype(np.int64)
    for first in range(0, 600, 128):
        piece = torch.from_numpy(text[first : first + 129])
        with torch.no_grad():
            nll += torch.nn.functional.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="none").tolist()
    assert scaled["nll"] == pytest.approx(np.mean(nll), rel=1e-6) and scaled["nll"] != pytest.approx(plain["nll"], rel=1e-5)
    assert [line.split()[1:3] for line in render([plain, scaled]).splitlines()[1:]] == [["carope", "30"], ["carope", "yarn×2"]]


@pytest.mark.parametrize(
    ("run", "rope_scaling", "scale", "message"),
    [
        ("learned", "yarn", 2.0, "--rope_scaling: encoding 'learned' does not turn queries and keys by phases"),
        ("carope", "ntk", 0.5, "--scale = 0.5: must be at least 1"),
        ("carope", "ntk", math.nan, "--scale = nan: must be at least 1"),
        ("carope", "ntk", None, "--scale is missing"),
        ("carope", None, 2.0, "--rope_scaling is missing"),
    ],
)
def test_refusals(runs, run, rope_scaling, scale, message):
    with pytest.raises(UserError) as refused:
        evaluate_run(runs / run, [64], CPU, rope_scaling=rope_scaling, scale=scale)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_the_command(runs, tmp_path, monkeypatch, capsys):
    words = ["eval_ppl.py", str(runs / "carope"), "--lengths", "64", "--max_tokens", "300", "--device", "cpu"]
    words += ["--rope_scaling", "dynamic", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", [*words, "--scale", "4"])
    with pytest.raises(SystemExit) as left:
        eval_ppl.main()
    assert not left.value.code
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert (result["rope_scaling"], result["scale"]) == ("dynamic", 4)
    assert "carope dynamic×4" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words, "--scale", "0"])
    with pytest.raises(SystemExit) as left:
        eval_ppl.main()
    assert left.value.code == 2 and "--scale = 0: must be at least 1" in capsys.readouterr().err
