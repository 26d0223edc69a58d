"""--init_from: weights of Hugging Face's GPT-2 and of our own runs, what is refused, and that a resume does not read them."""

import json

import pytest
import torch
from conftest import logged, torchrun
from test_export import saved
from test_positional import T, build, tokens

from core.config import load_config
from core.errors import UserError
from core.initial import load_initial
from lab.export_hf.export import export
from train import train


def random_gpt2(transformers, folder, **options) -> torch.nn.Module:
    """A Hugging Face GPT-2 of random weights, saved by transformers."""
    sizes = {"vocab_size": 90, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="pip install -e '.[eval]'")


def test_a_gpt2_that_transformers_saved_gives_its_logits_here(transformers, tmp_path, capsys):
    theirs = random_gpt2(transformers, tmp_path)
    ours = build("learned")
    load_initial(str(tmp_path), ours, say=True)
    idx = tokens(T) % 90
    with torch.no_grad():
        logits = ours(idx)
        torch.testing.assert_close(logits[..., :90], theirs(idx).logits, atol=1e-4, rtol=0)
        padding = logits[..., 90:]  # no likelier than the tokens are on average
        torch.testing.assert_close(padding, logits[..., :90].mean(-1, keepdim=True).expand_as(padding), atol=1e-4, rtol=0)
    said = capsys.readouterr().err
    assert "vocabulary padded from 90 to 97 rows" in said and f"the first {T} of 48 positions" in said


@pytest.mark.parametrize("encoding", ["learned", "carope"])
def test_an_export_comes_back_with_the_same_logits(tmp_path, encoding):
    before = saved(tmp_path / "run", encoding)
    export(tmp_path / "run", tmp_path / "out")
    idx = tokens(T)
    for source in ("out", "run", "run/checkpoints/step_000003"):
        after = build(encoding, "--vocab_size=320", spread=2.0)
        load_initial(str(tmp_path / source), after)
        with torch.no_grad():
            torch.testing.assert_close(after(idx)[..., :257], before(idx)[..., :257], atol=1e-5, rtol=0)


def test_another_encoding_takes_all_but_the_positions_and_says_so(tmp_path, capsys):
    before = saved(tmp_path / "run", "learned").state_dict()
    model = build("carope_hidden", "--vocab_size=320")
    own = {name: p.clone() for name, p in model.state_dict().items()}
    load_initial(str(tmp_path / "run"), model, say=True)
    for name, p in model.state_dict().items():
        assert torch.equal(p, own[name] if "wpe" in name else before[name])
    said = capsys.readouterr().err
    assert "wpe.weight not taken: of encoding 'learned'" in said
    assert "h.0.wpe.W.bias, h.0.wpe.W.weight, h.1.wpe.W.bias and 1 more as initialized: of encoding 'carope_hidden'" in said


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({"n_head": 4}, [], "4 heads, the model 2; --n_head=4"),
        ({"n_layer": 3}, [], "h.2.attn.c_attn.bias is [96] in"),
        ({"n_positions": 16}, [], "wpe.weight is [16, 32] in"),
        ({"vocab_size": 200}, [], "wte.weight is [200, 32] in"),
        ({"activation_function": "relu"}, [], "activation_function = 'relu'; the model here has 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, [], "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(transformers, tmp_path, options, words, message):
    random_gpt2(transformers, tmp_path, **options)
    with pytest.raises(UserError) as refused:
        load_initial(str(tmp_path), build("learned", *words))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama"}', '{"model_type": "gpt2"}'])
def test_a_folder_that_is_no_gpt2_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="init_from: "):
        load_initial(str(tmp_path), build("learned"))
    with pytest.raises(UserError, match="no such run or checkpoint"):
        load_initial(str(tmp_path / "nowhere"), build("learned"))


def test_a_run_starts_from_them_and_does_not_read_them_again(small, runs, tmp_path, capsys):
    sizes = ["--n_layer=1", "--encoding=learned", "--name=tuned", "--steps=1", "--eval_every=1", "--warmup_steps=0"]
    source = tmp_path / "source"
    source.symlink_to(runs / "learned")
    words = [*small, *sizes, f"--init_from={source}"]
    assert train(load_config(words)) == 0 and f"init_from: weights from {source}" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "tuned/log.jsonl").read_text().splitlines()]
    earlier = [json.loads(line) for line in (runs / "learned/log.jsonl").read_text().splitlines()]
    first, last = log[0]["val_loss"], [one["val_loss"] for one in earlier if "val_loss" in one][-1]
    assert abs(first - last) < 0.3 < earlier[0]["val_loss"] - first
    source.unlink()
    assert train(load_config(words)) == 0 and "finished" in capsys.readouterr().out
    assert logged(tmp_path / "tuned") == len(log)
    with pytest.raises(UserError, match="init_from"):
        train(load_config(words[:-1]))


@pytest.mark.slow
def test_sharded_ranks_start_from_the_same_weights(small, runs, tmp_path):
    sizes = ["--n_layer=1", "--encoding=learned", "--steps=1", "--eval_every=1", "--warmup_steps=0"]
    words = [*small, *sizes, f"--init_from={runs / 'learned'}"]
    assert train(load_config([*words, "--name=alone"])) == 0
    done = torchrun(2, "train.py", *words, "--name=sharded", "--parallel=fsdp")
    assert done.returncode == 0 and done.stderr.count("init_from: weights from") == 1, done.stderr
    losses = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["val_loss"] for name in ("alone", "sharded")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
