"""The model against Hugging Face's, its sizes, its loss and its sampling."""

import math
import shutil
import sys

import pytest
import torch
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_positional import build

from core.attention import _is_one_token, attention
from core.config import load_config
from core.kernels.native import native
from core.kernels.packed import BlockedLinear, PackedLinear, can_pack, pack
from model import GPT, KVCache, sample_token
from positional import ENCODINGS

needs_native = pytest.mark.skipif(native() is None, reason="no compiler")
SIZES = ["--n_layer=3", "--n_head=4", "--n_embd=64", "--vocab_size=151", "--block_size=64"]


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, biases and layer norms too."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module.eval()


def tokens(n: int, batch: int = 3, vocab: int = 151) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, n), generator=torch.Generator().manual_seed(4))


def test_learned_equals_hugging_face_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=151, n_positions=64, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    ours = GPT(load_config([*SIZES, "--encoding=learned"])).eval()
    weights = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items() if k.startswith("transformer.")}
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's Conv1D keeps them transposed
    ours.load_state_dict({name: p.T if name.endswith(linear) else p for name, p in weights.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(64)), theirs(tokens(64)).logits, atol=1e-4, rtol=0)


def test_rope_equals_hugging_face_gpt_neox():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=151, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        hidden_act="gelu_new", rotary_pct=1.0, max_position_embeddings=64, layer_norm_eps=1e-5, use_parallel_residual=False,
        attention_dropout=0.0, hidden_dropout=0.0, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    theirs = shaken(transformers.GPTNeoXForCausalLM(config))
    ours = GPT(load_config([*SIZES, "--encoding=rope"])).eval()
    names = {
        "gpt_neox.embed_in": "wte", "gpt_neox.final_layer_norm": "ln_f", "gpt_neox.layers": "h", "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2", "attention.query_key_value": "attn.c_attn", "attention.dense": "attn.c_proj",
        "mlp.dense_h_to_4h": "mlp.c_fc", "mlp.dense_4h_to_h": "mlp.c_proj",
    }  # fmt: skip
    weights = {}
    for name, p in theirs.state_dict().items():
        if "rotary" in name or "embed_out" in name or "lm_head" in name:
            continue
        if "query_key_value" in name:  # theirs interleaves q, k, v by head
            p = p.view(4, 3, 16, *p.shape[1:]).transpose(0, 1).reshape(p.shape)
        for their_name, our_name in names.items():
            name = name.replace(their_name, our_name)
        weights[name] = p
    ours.load_state_dict(weights)
    head = theirs.get_output_embeddings().weight
    assert torch.equal(head, theirs.gpt_neox.embed_in.weight)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(64)), theirs(tokens(64)).logits, atol=1e-4, rtol=0)


W = {"tiny": 512 * 8 + 8, "small": 768 * 12 + 12}  # CARoPE's W and its bias
LEARNED = {"tiny": 512 * 512, "small": 512 * 768}


@pytest.mark.parametrize(("size", "total", "embedding"), [("tiny", 44_670_976, 25_755_648), ("small", 123_689_472, 38_633_472)])
def test_parameter_counts(size, total, embedding):
    for encoding, extra in (("rope", 0), ("sinusoidal", 0), ("carope", W[size]), ("learned", LEARNED[size])):
        with torch.device("meta"):
            cfg = load_config([f"config/{size}.toml", f"config/{encoding}.toml"])
            counts = GPT(cfg).n_params()
        assert counts == {"total": total + extra, "embedding": embedding, "encoding": extra, "body": total - embedding}
    assert cfg.flops_per_token == {"tiny": 286_654_464, "small": 798_031_872}[size]


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_loss_is_the_mean_of_the_token_losses_and_starts_at_the_uniform_guess(encoding):
    model = GPT(load_config([*SIZES, f"--encoding={encoding}"]))
    x, y = tokens(64), tokens(64).roll(-1, 1)
    nll = model(x, y, reduction="none")
    assert nll.shape == (3, 64)
    assert model(x, y).item() == pytest.approx(nll.mean().item(), rel=1e-6)
    logits = model(x).double().log_softmax(-1)
    torch.testing.assert_close(nll.double(), -logits.gather(-1, y[..., None])[..., 0], atol=1e-5, rtol=0)
    assert nll.mean().item() == pytest.approx(math.log(151), abs=0.1)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_padding_of_the_vocabulary_is_never_sampled(encoding):
    model = GPT(load_config([*SIZES, f"--encoding={encoding}"]))
    with torch.no_grad():
        model.wte.weight[100:] *= 100  # the padding now has by far the largest logits
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0, 5.0):
        new = list(model.generate(tokens(4, vocab=100), 30, n_vocab=100, temperature=temperature, generator=generator))
        assert len(new) == 30
        assert max(int(t.max()) for t in new) < 100


def test_generation_ends_where_a_learned_table_ends_and_goes_on_elsewhere():
    models = {name: GPT(load_config([*SIZES, f"--encoding={name}"])) for name in ("learned", "carope")}
    made = {name: len(list(model.generate(tokens(56), 30, n_vocab=151))) for name, model in models.items()}
    assert made == {"learned": 9, "carope": 30}  # 56 + 8 fill the table of 64; the ninth new token is read off the last


def test_greedy_generation_equals_recomputing_from_scratch():
    model = shaken(GPT(load_config([*SIZES, "--encoding=carope"])))
    idx = tokens(5)
    with torch.no_grad():
        for next_B in model.generate(idx, 60, 151, temperature=0):
            assert torch.equal(next_B, model(idx)[:, -1].argmax(-1))
            idx = torch.cat((idx, next_B[:, None]), dim=1)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_rows_with_a_generator_each_draw_what_they_draw_alone(encoding):
    model = shaken(GPT(load_config([*SIZES, f"--encoding={encoding}"])))
    idx = tokens(5)

    def drawn(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return torch.stack(list(model.generate(idx[rows], 20, 151, top_k=40, top_p=0.9, generator=generators)), dim=1)

    assert torch.equal(drawn([0, 1, 2]), torch.cat([drawn([0]), drawn([1]), drawn([2])]))
    assert not torch.equal(drawn([0]), drawn([1]))


def test_the_last_logits_alone_are_the_last_of_all():
    model = shaken(GPT(load_config([*SIZES, "--encoding=carope"])))
    with torch.no_grad():
        last = model(tokens(9), last_only=True)
        torch.testing.assert_close(last, model(tokens(9))[:, -1:], atol=1e-5, rtol=0)
    assert last.shape == (3, 1, 151)


@pytest.mark.parametrize("encoding", ["rope", "carope", "learned"])
def test_decoding_in_bf16_stays_as_close_to_fp32_as_the_full_forward(encoding):
    model = shaken(GPT(load_config([*SIZES, f"--encoding={encoding}"])))
    idx, cache = tokens(40), KVCache()
    with torch.no_grad():
        exact = model(idx)
        with torch.autocast("cpu", torch.bfloat16):
            full = model(idx)
            cached = torch.cat([model(idx[:, i : i + 1], cache=cache) for i in range(40)], dim=1)
    assert {k.dtype for pair in cache.kv.values() for k in pair} == {torch.float32}
    assert (cached - exact).square().mean() < 1.5 * (full - exact).square().mean()


def test_sampling_follows_the_probabilities_and_their_cuts():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, 4)

    def frequencies(**options) -> torch.Tensor:
        options = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "generator": torch.Generator().manual_seed(1)} | options
        return torch.bincount(sample_token(logits, **options), minlength=4) / len(logits)

    torch.testing.assert_close(frequencies(), probs, atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.01), torch.tensor([1.0, 0, 0, 0]), atol=0, rtol=0)
    torch.testing.assert_close(frequencies(temperature=0.5), probs**2 / (probs**2).sum(), atol=0.02, rtol=0)
    assert frequencies(temperature=0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_an_id_of_no_probability_is_not_even_drawn_at_the_ends(drawn, monkeypatch):
    """What a generator gives is at least 0 and below 1; rounding could make it the whole mass."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **options: torch.full(shape, drawn, **options))
    logits = torch.tensor([-math.inf, 0.3, 1.7, 0.1, -math.inf, -math.inf]).repeat(2, 1)
    ids = [sample_token(logits, 1.0, None, 1.0, generator) for generator in (None, [torch.Generator()] * 2)]
    assert [one.tolist() for one in ids] == [[1 if drawn == 0 else 3] * 2] * 2


@pytest.fixture
def without_native(monkeypatch):
    """A machine whose compiler does not work."""
    monkeypatch.setenv("CXX", "false")
    native.cache_clear()
    assert native() is None
    yield
    native.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
def test_there_is_a_native_kernel_where_there_is_a_compiler():
    assert native() or not shutil.which("c++")


@needs_native
@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 100), st.integers(1, 70), st.booleans())
def test_blocked_linear_layers_are_torchs(M, N, K, has_bias):
    generator = torch.Generator().manual_seed(M * N * K)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((M, 1, K), (N, K), (N,)))
    bias = bias if has_bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(BlockedLinear(weight, bias)(x).double(), wanted, atol=2e-5, rtol=1e-5)


@needs_native
@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 90), st.sampled_from([16, 48, 64, 128]), st.floats(0.1, 5))
def test_attention_of_one_token_is_torchs(B, H, S, D, size):
    generator = torch.Generator().manual_seed(B * S * D)
    q, k, v = (size * torch.randn(B, H, n, D, generator=generator) for n in (1, 100, 100))
    k, v = k[:, :, :S], v[:, :, :S]  # as a cache holds them, with room behind
    with torch.no_grad():
        assert _is_one_token(q, k, v)
        found, other = attention(q, k, v, None), attention(q, k, v.mT.contiguous().mT, None)  # which lies otherwise
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for one in (found, other):
        torch.testing.assert_close(one.double(), wanted, atol=2e-5 * size, rtol=1e-4)


def test_what_has_a_gradient_is_not_the_native_kernels():
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (1, 5, 5))
    attention(q, k, v, None).sum().backward()
    assert q.grad.norm() > 0


@pytest.mark.parametrize("encoding", ["rope", "cable"])
def test_decoding_without_a_compiler(without_native, encoding):
    test_packed_linear_layers_give_the_same_logits(encoding)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_packed_linear_layers_give_the_same_logits(encoding):
    model = shaken(GPT(load_config([*SIZES, f"--encoding={encoding}"])))
    idx = tokens(20)
    with torch.no_grad():
        exact = model(idx)
        pack(model, torch.float32)
        kind = BlockedLinear if native() else PackedLinear if can_pack(idx.device, torch.float32) else type(None)
        assert isinstance(model.head, kind)
        torch.testing.assert_close(model(idx), exact, atol=1e-4, rtol=0)
        cache = KVCache()
        cached = torch.cat([model(idx[:, i : i + 1], cache=cache) for i in range(20)], dim=1)
        torch.testing.assert_close(cached, exact, atol=1e-4, rtol=0)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="no bf16 instructions")
def test_packed_in_bf16_stays_as_close_to_fp32_as_autocast():
    model = shaken(GPT(load_config([*SIZES, "--encoding=carope"])))
    idx = tokens(40)
    with torch.no_grad():
        exact = model(idx)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(idx)
            pack(model, torch.bfloat16)
            packed = model(idx)
    assert packed.dtype == cast.dtype == torch.bfloat16
    assert (packed - exact).square().mean() < 1.5 * (cast - exact).square().mean()


def test_nothing_is_packed_where_onednn_has_no_blocks():
    model = GPT(load_config([*SIZES, "--encoding=rope"]))
    before = [type(m) for m in model.modules()]
    pack(model, torch.float16)
    pack(model.to("meta"), torch.float32)
    assert [type(m) for m in model.modules()] == before and model.head is None


def test_the_residual_stream_in_bf16_is_asked_for_and_only_under_autocast():
    idx = tokens(40, vocab=97)
    fp32, bf16 = (build("rope", f"--residual={kind}", "--block_size=64") for kind in ("float32", "bfloat16"))
    seen: list[torch.dtype] = []
    for model in (fp32, bf16):
        for block in model.h:
            block.register_forward_hook(lambda _block, args, out: seen.extend((args[0].dtype, out.dtype)))
    assert torch.equal(fp32(idx), bf16(idx)) and set(seen) == {torch.float32}
    losses = []
    for model, wanted in ((fp32, torch.float32), (bf16, torch.bfloat16)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        assert set(seen) == {wanted} and all(p.grad.dtype == torch.float32 for p in model.parameters())
        losses.append(loss.item())
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_residual_stream_in_bf16_is_refused_where_nothing_else_is(small):
    done = run_command("train.py", *small, "--residual=bfloat16", "--dtype=float32", "--device=cpu", "--name=refused")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "residual = 'bfloat16'" in done.stderr and "--dtype=bfloat16" in done.stderr
