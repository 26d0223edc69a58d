"""Exports: transformers loads them, computes our logits, generates our tokens; tokenizers give our ids."""

import json
import os
import re
import sys
import tomllib

import pytest
import torch
from conftest import ROOT, keep_remote_code, run_command
from safetensors.torch import load_file
from test_positional import build

from core.checkpoint import MODEL, OPTIMIZER, State, write_checkpoint
from core.errors import UserError
from core.files import sha256_file
from lab.export_hf.bundle import REPLACED, bundle
from lab.export_hf.export import export
from positional import ENCODINGS
from text.tokenizer import load_tokenizer

ALL = sorted(ENCODINGS)
TEXT = "Return the naïve\tsum — of 12,345 € …\n\n  It's    done. 日本"


def saved(run, encoding: str, tokenizer: str = "bytes", vocab: int = 320):
    """A run folder with a checkpoint of a small model that is away from its start."""
    model = build(encoding, f"--vocab_size={vocab}", f"--name=a-{encoding}")
    state = State(
        step=3, tokens=300, config=model.cfg.model_dump(), tokenizer=tokenizer, train_tokens=1000, shards=[], val_loss=2.5,
        val_step=3, log_bytes=0, guard={}, git="abc",
    )  # fmt: skip
    write_checkpoint(run, {MODEL: model.state_dict(), OPTIMIZER: {}}, state)
    return model


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    found = pytest.importorskip("transformers", reason="pip install -e '.[eval]'")
    keep_remote_code(monkeypatch, tmp_path / "modules")
    return found


@pytest.mark.parametrize("encoding", ALL)
def test_transformers_computes_our_logits_and_generates_our_tokens(transformers, tmp_path, encoding):
    ours = saved(tmp_path / "run", encoding)
    architecture = export(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=encoding not in ("learned", "rope")
    ).eval()
    assert type(theirs).__name__ == architecture
    if encoding not in ("learned", "rope"):  # the code beside the weights, and not that of this process
        assert type(theirs.transformer).__module__.startswith("transformers_modules.")
    assert sum(p.numel() for p in theirs.parameters()) == ours.n_params()["total"] - (320 - 257) * 32
    idx = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[..., :257], atol=1e-4, rtol=0)
    prompt, n_new = idx[:, :5], 20
    mine = torch.stack(list(ours.generate(prompt, n_new, 257, temperature=0)), dim=1)
    options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    torch.testing.assert_close(theirs.generate(prompt, **options)[:, 5:], mine)


def test_the_cache_is_used_and_beams_reorder_it(transformers, tmp_path):
    saved(tmp_path / "run", "carope_hidden")
    export(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    widths = []
    model.transformer.register_forward_pre_hook(lambda _, args: widths.append(args[0].size(1)))
    prompt = torch.arange(10).view(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "eos_token_id": None, "pad_token_id": 256}
    cached = model.generate(prompt, **options)
    assert widths == [5] + 7 * [1]
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    loss = model(prompt, labels=prompt).loss
    torch.testing.assert_close(loss, model.transformer(prompt[:, :-1], prompt[:, 1:].contiguous()))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding on the left"):
        model(prompt, attention_mask=mask)
    torch.testing.assert_close(model(prompt, attention_mask=mask.flip(1)).logits, model(prompt).logits)


@pytest.fixture
def exported(transformers, tmp_path):
    """An export of CARoPE, loaded as its users load it."""
    saved(tmp_path / "run", "carope")
    export(tmp_path / "run", tmp_path / "out")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()


IDS = torch.arange(48).view(2, 24)


def test_a_cache_that_is_passed_in_is_used(exported):
    with torch.no_grad():
        whole, first = exported(IDS), exported(IDS[:, :10])
        second = exported(IDS[:, 10:20], past_key_values=first.past_key_values)
        third = exported(
            IDS[:, 20:], past_key_values=second.past_key_values, use_cache=True, cache_position=torch.arange(20, 24)
        )
    for found, part in ((second, slice(10, 20)), (third, slice(20, 24))):
        torch.testing.assert_close(found.logits, whole.logits[:, part], atol=1e-5, rtol=0)
    assert first.past_key_values is second.past_key_values and exported(IDS, use_cache=False).past_key_values is None
    assert exported.train()(IDS).past_key_values is None


def test_what_is_asked_of_forward_is_given(exported):
    blocks, seen = [*exported.transformer.h, exported.transformer.ln_f], []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in blocks]
    found = exported(IDS, output_hidden_states=True, labels=IDS)
    for hook in hooks:
        hook.remove()
    assert len(found.hidden_states) == exported.config.num_hidden_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states[:-1], seen[:-1], strict=True))
    torch.testing.assert_close(found.hidden_states[-1] @ exported.transformer.wte.weight.T, found.logits)
    plain = exported(IDS, labels=IDS, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], found.loss) and torch.equal(plain[1], found.logits)
    assert torch.equal(exported(IDS, logits_to_keep=torch.tensor([3, 7])).logits, found.logits[:, [3, 7]])
    mask = torch.ones_like(IDS)
    mask[0, 20:] = 0
    same = exported(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).masked_fill(mask == 0, 1))
    assert torch.equal(same.logits, found.logits)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("attention_mask", torch.ones(2, 1, 24, 24), "has 4 dimensions"),
        ("attention_mask", (torch.arange(24) > 2).expand(2, 24).long(), "padding on the left"),
        ("position_ids", torch.arange(1, 25), "counts positions from the first token on"),
        ("position_ids", torch.arange(24).repeat(2, 1).flip(1), "counts positions from the first token on"),
        ("inputs_embeds", torch.zeros(2, 24, 32), "inputs_embeds: not supported"),
        ("output_attentions", True, "output_attentions: not supported"),
        ("past_key_values", (), "a tuple has no room for coordinates"),
    ],
)
def test_what_forward_cannot_do_it_refuses(exported, argument, value, message):
    with pytest.raises(ValueError, match=message):
        exported(IDS, **{argument: value})
    with pytest.raises(TypeError, match="token_type_ids"):
        exported(IDS, token_type_ids=torch.zeros_like(IDS))


def test_transformers_own_cache_is_refused_before_it_loses_anything(transformers, exported):
    for call in (exported, exported.generate):
        with pytest.raises(ValueError, match="a DynamicCache has no room for coordinates"):
            call(IDS, past_key_values=transformers.DynamicCache())


def test_trainer_takes_the_same_step_whatever_it_accumulates(transformers, exported, tmp_path):
    """The loss, and the weights after a step of plain SGD, for four texts at a time and one by one."""
    pytest.importorskip("accelerate", reason="pip install -e '.[eval]'")
    texts = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(4, 24)]
    before = {name: p.detach().clone() for name, p in exported.named_parameters()}
    after, losses = [], []
    for size in (4, 1):
        exported.load_state_dict(before, strict=False)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1, optim="sgd",
            learning_rate=0.1, max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            logging_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(exported, arguments, train_dataset=texts)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        after.append({name: p.detach().clone() for name, p in exported.named_parameters()})
    mean = (
        exported.load_state_dict(before, strict=False)
        and exported(torch.stack([t["input_ids"] for t in texts]), labels=torch.stack([t["labels"] for t in texts])).loss
    )
    assert losses == pytest.approx([mean.item()] * 2, rel=1e-3)
    for name, p in after[0].items():
        torch.testing.assert_close(p, after[1][name], atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(p, before[name]) for name, p in after[0].items())


@pytest.mark.parametrize("encoding", ["path", "carope"])
def test_in_bf16_the_encoding_stays_in_fp32(transformers, tmp_path, encoding):
    ours = saved(tmp_path / "run", encoding)
    export(tmp_path / "run", tmp_path / "out")
    options = {"trust_remote_code": True, "dtype": torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    for name, p in theirs.named_parameters():
        assert p.dtype == (torch.float32 if "wpe" in name else torch.bfloat16)
    idx = torch.arange(64).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits.float(), ours(idx)[..., :257], atol=0.1, rtol=0)


@pytest.mark.parametrize("narrow", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_an_encoding_stays_in_fp32_whoever_narrows_the_model(exported, narrow):
    """W in bf16 would turn the last of 512 tokens by a wrong angle."""
    idx = torch.randint(0, 257, (1, 512), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exported.transformer.wpe.W.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
        whole, wpe = exported(idx).logits, exported.transformer.wpe.W.weight.clone()
        narrow(exported)
        assert torch.equal(exported.transformer.wpe.W.weight, wpe) and exported.transformer.wte.weight.dtype.itemsize == 2
        assert (exported(idx).logits.float() - whole).abs().max() < 0.1


def test_more_ids_may_be_added(transformers, exported, tmp_path):
    before = exported(IDS).logits
    exported.resize_token_embeddings(300, mean_resizing=False)
    after = exported(IDS).logits
    assert after.shape[-1] == 300 and torch.equal(after[..., :257], before)
    exported.save_pretrained(tmp_path / "more")
    for name, text in bundle("carope").items():
        (tmp_path / "more" / name).write_text(text)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more", trust_remote_code=True).eval()
    assert again.config.vocab_size == 300 and torch.equal(again(IDS).logits, after)


def test_gradient_checkpointing_changes_no_gradient(exported):
    grads = []
    for name in ("disable", "enable"):
        getattr(exported.train(), f"gradient_checkpointing_{name}")()
        assert exported.is_gradient_checkpointing is (name == "enable")
        exported.zero_grad()
        exported(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in exported.parameters()])
    assert all(map(torch.equal, *grads))
    with pytest.raises(ValueError, match="use_reentrant"):
        exported.gradient_checkpointing_enable({"use_reentrant": True})


def test_what_generate_or_accelerate_cannot_do_with_it_is_refused(transformers, exported, tmp_path):
    pytest.importorskip("accelerate", reason="pip install -e '.[eval]'")
    with pytest.raises(ValueError, match="assisted decoding takes tokens back"):
        exported.generate(IDS[:1, :8], prompt_lookup_num_tokens=2, max_new_tokens=4, do_sample=False)
    parts = {"transformer.wte": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu", "transformer.wpe": "cpu"}
    options = {"trust_remote_code": True, "device_map": parts, "offload_folder": tmp_path / "off"}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    with pytest.raises(ValueError, match="device_map: offloads a part of this model"):
        offloaded(IDS)


def test_two_exports_of_one_name_run_each_its_own_code(transformers, tmp_path, monkeypatch):
    saved(tmp_path / "run", "carope")
    export(tmp_path / "run", tmp_path / "one/m")
    monkeypatch.setitem(REPLACED, "core.kernels.native", REPLACED["core.kernels.native"] + "\n\nMARK = 2\n")
    export(tmp_path / "run", tmp_path / "two/m")
    load = transformers.AutoModelForCausalLM.from_pretrained
    modules = [type(load(tmp_path / name, trust_remote_code=True)).__module__ for name in ("one/m", "two/m")]
    natives = [sys.modules[name.replace("modeling_carope", "core_kernels_native")] for name in modules]
    assert [getattr(native, "MARK", 1) for native in natives] == [1, 2]


def test_an_export_beside_the_code_is_not_checked_with_it():
    """`make test` with one under runs/ or exported/, where the docs have them: mypy would find each module twice."""
    ignored = (ROOT / ".gitignore").read_text().split()  # what ruff passes over
    exclude = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["exclude"]
    for folder in ("runs", "exported"):
        assert f"/{folder}/" in ignored and any(re.search(pattern, f"{folder}/x/model.py") for pattern in exclude)


def test_llama_cpp_finds_what_it_asks_for(tmp_path):
    """Keys of its converter: a context length, a head of its own, which is the embedding."""
    for encoding, key in (("learned", "n_ctx"), ("rope", "max_position_embeddings")):
        saved(tmp_path / encoding, encoding)
        export(tmp_path / encoding, tmp_path / f"{encoding}-hf")
        assert json.loads((tmp_path / f"{encoding}-hf/config.json").read_text())[key] == 32
    weights = load_file(tmp_path / "rope-hf/model.safetensors")
    assert torch.equal(weights["embed_out.weight"], weights["gpt_neox.embed_in.weight"])


@pytest.mark.parametrize(("name", "vocab"), [("bytes", 320), ("gpt2", 50304)])
def test_the_tokenizer_gives_our_ids(transformers, tmp_path, name, vocab):
    saved(tmp_path / "run", "carope", name, vocab)
    export(tmp_path / "run", tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(name)
    ids = ours.encode(TEXT).tolist()
    assert theirs.encode(TEXT) == ids and theirs.decode(ids) == TEXT
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == theirs.bos_token_id == ours.eot


def test_the_code_beside_the_weights_is_ours_and_asks_for_torch_and_transformers_only():
    import ast

    files = bundle("carope")
    for name, text in files.items():
        nodes = list(ast.walk(ast.parse(text)))
        named = [n.names[0].name for n in nodes if isinstance(n, ast.Import)]
        named += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
        assert {n.partition(".")[0] for n in named} <= {"torch", "transformers", *sys.stdlib_module_names}, name
        relative = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level}
        assert {f"{module}.py" for module in relative} <= files.keys()
    named = re.findall(r"from \.(\w+) import", files["modeling_carope.py"])
    assert {f"{name}.py" for name in named} | {"modeling_carope.py"} == files.keys()  # transformers 4 follows no further
    assert {"modeling_carope.py", "configuration_carope.py", "model.py", "positional.py", "core_attention.py"} <= files.keys()
    ours = (ROOT / "positional/carope.py").read_text()
    assert files["positional_carope.py"] == re.sub(r"^from (positional|core)\.", r"from .\1_", ours, flags=re.MULTILINE)


BESIDE = """
import gc, importlib.util, torch
from core.kernels import key_bias
from core import numerics as base
held = []
for n in range(3):
    for ours in (base, key_bias):
        spec = importlib.util.spec_from_file_location(f"copy_{n}", ours.__file__)
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        held.append(other)
x = torch.ones(1, 1, 2, 4)
operators = [o for m in [base, key_bias, *held] for o in [getattr(m, "in_memory", None) or m.key_bias_gradient]]
assert len({o._qualname for o in operators}) == 8
for one in operators:
    one(*([x] if "in_memory" in one._qualname else [x, x, x, x, x[..., 0]]))
del held, other, spec, operators, one
gc.collect()
print(torch.equal(base.in_memory(x), x), *key_bias.key_bias_gradient(x, x, x, x, x[..., 0]).shape)
"""


@pytest.mark.slow
def test_a_copy_of_the_code_has_operators_of_its_own():
    """To define an operator anew frees what the first copy calls: a worker of these tests died of it."""
    done = run_command("-c", BESIDE)
    assert (done.returncode, done.stdout) == (0, "True 1 1 2\n"), done.stderr


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    saved(run, "alibi")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    done = run_command("lab.export_hf", run, tmp_path / "taken")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is there already" in done.stderr
    before = sorted(os.listdir(tmp_path))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lab.export_hf.export.save_file", fail)
        with pytest.raises(UserError, match="No space left"):
            export(run, out)
    assert sorted(os.listdir(tmp_path)) == before
    out.mkdir()
    assert export(run, out) == "CARoPEForCausalLM"


def test_the_model_card_says_what_the_run_says(tmp_path):
    run = tmp_path / "run"
    saved(run, "carope")
    export(run, tmp_path / "first")
    of_it = {"tokens": 1000, "step": 3, "weights": sha256_file(run / "checkpoints/step_000003" / MODEL)}
    results = [
        of_it | {"length": 512, "perplexity": 7.25, "special": ["first 1000"]},
        of_it | {"length": 512, "perplexity": 7.5, "special": ["stride 8"]},
        of_it | {"length": 512, "perplexity": 7.75, "special": [], "weights": "of the run that was here before"},
    ]
    (run / "eval.json").write_text(json.dumps(results))
    export(run, tmp_path / "second")
    first, second = ((tmp_path / name / "README.md").read_text() for name in ("first", "second"))
    assert "2.5000 nats" in first and "| 512 | 7.25 | 1,000 |" in second and second.count("| 512 | 7") == 1
    assert "33,762 parameters" in first  # 63 rows of padding fewer than in training
    assert "license: mit" in first and "`carope`" in first and "| tokens seen | 300 |" in first and "abc" in first


def test_an_encoding_from_elsewhere_is_refused(tmp_path, monkeypatch):
    class Elsewhere(ENCODINGS["rope"]):
        pass

    monkeypatch.setitem(ENCODINGS, "elsewhere", Elsewhere)
    saved(tmp_path / "run", "elsewhere")
    with pytest.raises(UserError, match="move it there"):
        export(tmp_path / "run", tmp_path / "out")
