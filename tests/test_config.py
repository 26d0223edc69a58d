"""Layering, help, and every refusal of the configuration."""

import re

import pytest
from conftest import ROOT, as_rank, run_command
from hypothesis import given
from hypothesis import strategies as st

from core.config import ELSEWHERE, Config, grad_accum, load_config, to_toml
from core.errors import UserError
from model import GPT
from positional import ENCODINGS


def test_carope_of_head_width_2_starts():
    """f⁰ = 1 for its one pair: W does nothing, and its bias must not overflow."""
    cfg = load_config(["--encoding=carope", "--n_embd=8", "--n_head=4", "--n_layer=1", "--vocab_size=9"])
    assert GPT(cfg).wpe.W.bias.isfinite().all()


def test_a_message_is_one_line_whatever_is_quoted_in_it():
    assert str(UserError("a\nb\x1b[31m.toml: no")) == "a b [31m.toml: no"


def test_files_are_layered_and_the_command_line_goes_on_top(tmp_path):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text('n_layer = 3\nlr = 1e-3\nencoding = "rope"\n')
    second.write_text('encoding = "carope"\nseed = 5\n')
    cfg = load_config([str(first), "--warmup-steps=7", str(second), "--seed", "6", "--tensorboard=true"])
    assert (cfg.n_layer, cfg.lr, cfg.encoding, cfg.seed, cfg.warmup_steps, cfg.tensorboard) == (3, 1e-3, "carope", 6, 7, True)
    assert load_config(["--name=other", str(first)]).name == "other"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "gpt2-rope"),
        (["--encoding=carope", "--seed=2"], "gpt2-carope-s2"),
        (["config/carope.toml"], "gpt2-carope"),
        (["config/demo.toml"], "demo-rope"),
        (["config/demo.toml", "--encoding=carope"], "demo-carope"),
        (["config/demo.toml", "config/carope.toml"], "demo-carope"),
        (["config/carope.toml", "config/demo.toml"], "demo-carope"),
        (["config/demo.toml", "config/carope.toml", "--encoding=rope"], "demo-rope"),
        (["config/demo.toml", "config/carope.toml", "config/rope.toml"], "demo-rope"),
        (["config/demo.toml", "config/sinusoidal_equal.toml"], "demo-sinusoidal_equal"),
        (["config/demo.toml", "config/sinusoidal_equal.toml", "--encoding=sinusoidal"], "demo-sinusoidal_equal"),
        (["config/demo.toml", "config/sinusoidal_equal.toml", "config/sinusoidal.toml"], "demo-sinusoidal"),
        (["config/demo.toml", "config/xpos.toml", "--seed=1", "--xpos_scale_base=64"], "demo-xpos"),
        (["config/demo.toml", "config/carope.toml", "{tmp}/faster.toml", "--seed=3"], "demo-faster-carope-s3"),
        (["{tmp}/all.toml"], "all-alibi-s7"),
        (["{tmp}/all.toml", "--encoding=rope", "--seed=1"], "all-rope"),
    ],
)
def test_the_name_of_a_run_is_size_encoding_and_seed_however_they_are_said(words, name, tmp_path):
    (tmp_path / "faster.toml").write_text("lr = 2e-3\n")
    (tmp_path / "all.toml").write_text('encoding = "alibi"\nn_layer = 2\nseed = 7\n')
    assert load_config([word.format(tmp=tmp_path) for word in words]).name == name


@pytest.mark.parametrize("size", ["tiny", "small", "demo"])
@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_every_encoding_goes_with_every_size(size, encoding):
    file = ROOT / f"config/{encoding}.toml"
    cfg = load_config([str(ROOT / f"config/{size}.toml"), str(file) if file.exists() else f"--encoding={encoding}"])
    assert (cfg.name, cfg.encoding) == (f"{size}-{encoding}", encoding)


def test_the_papers_experiment():
    for size, shape in (("tiny", (6, 8, 512, 64)), ("small", (12, 12, 768, 32))):
        cfg = load_config([str(ROOT / f"config/{size}.toml")])
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.micro_batch) == shape
        assert (cfg.vocab_size, cfg.block_size, cfg.tokens_per_step) == (50304, 512, 524_288)
        assert (cfg.steps, cfg.warmup_steps, cfg.lr, cfg.min_lr) == (19_000, 750, 6e-4, 6e-5)
        assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip, cfg.eval_every) == (0.9, 0.95, 0.1, 1.0, 250)
        assert grad_accum(cfg, 2) == 524_288 // (cfg.micro_batch * 512 * 2)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1),
            "lr": st.floats(1e-4, 10),
            "seed": st.integers(0, 2**40),
            "tensorboard": st.booleans(),
        },
    )
)
def test_a_resolved_config_reads_back_as_it_was(values):
    import tomllib

    cfg = Config(**values)
    assert Config(**tomllib.loads(to_toml(cfg))) == cfg


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--stepz=3"], ["--stepz", "did you mean --steps"]),
        (["--step", "3"], ["--step", "did you mean --steps"]),
        (["--steps=many"], ["steps = 'many'", "command line", "integer"]),
        (["--steps=0"], ["steps = '0'", "greater than 0"]),
        (["--lr=-1"], ["lr = '-1'", "greater than 0"]),
        (["--device=tpu"], ["device = 'tpu'", "'auto', 'cuda', 'mps' or 'cpu'"]),
        (["--encoding=rpoe"], ["'rpoe'", "did you mean rope"]),
        (["--encoding=rop"], ["'rop'", "did you mean rope", "carope_hidden"]),
        (["--n_head=10"], ["n_head = 10", "n_embd = 768", "8, 12"]),
        (["--n_embd=36", "--n_head=4"], ["36 / 4 = 9", "even"]),
        (["--tokens_per_step=1000"], ["1000", "block_size = 512", "512 or 1024"]),
        (["--micro_batch=48"], ["524288", "48", "--micro_batch=32", "--micro_batch=64", "--tokens_per_step=516096"]),
        (["--vocab_size=70000"], ["70000", "65536"]),
        (["--min_lr=1"], ["min_lr = 1.0", "0.0006"]),
        (["--name=a/b"], ["'a/b'", "out_dir"]),
        (["nowhere.toml"], ["nowhere.toml", "No such file"]),
        (["config/smal.toml"], ["config/smal.toml", "did you mean config/small.toml"]),
    ],
)
def test_refusals(words, parts):
    with pytest.raises(UserError) as error:
        load_config(words)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_wrong_key_or_value_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    for text, parts in (
        ("n_layers = 3", ["'n_layers'", "did you mean n_layer?"]),
        ("n_layer = 'x'", ["n_layer = 'x'"]),
        ("=", []),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_config([str(file)])
        assert all(part in str(error.value) for part in [str(file), *parts])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size=3"], "no such option; here it is --micro_batch, sequences of one forward pass on a device"),
        (["--learning-rate=1e-3"], "here it is --lr. --help lists them"),
        (["--max_iters", "5"], "here it is --steps"),
        (["--gradient_accumulation_steps=3"], "here it is nothing: it follows from tokens_per_step"),
        (["--eval_interval=3"], "here it is --eval_every"),
        (["--dropout=0.1"], "here it is nothing: the paper's models have none"),
        (["--steps", "=", "100"], "--steps =: --key=value is written without spaces"),
        (["--steps=", "100"], "--steps= 100: --key=value is written without spaces"),
    ],
)
def test_names_from_elsewhere_and_spaces_are_answered(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(words)
    assert load_config(["--init_from=", "--wandb_project=", "config/demo.toml"]).init_from == ""


def test_names_from_elsewhere_are_none_of_ours():
    assert not set(ELSEWHERE) & set(Config.model_fields)
    for words in ELSEWHERE.values():
        name = re.match(r"\w+", words)[0]
        assert name in Config.model_fields or name in ("nothing", "eval_ppl", "python"), words


def test_an_option_that_is_gone_is_read_from_what_was_written_before(tmp_path):
    (tmp_path / "a.toml").write_text("replay_step = -1\nn_layer = 3")
    cfg = load_config([str(tmp_path / "a.toml")])
    assert cfg.n_layer == 3 and Config(**cfg.model_dump(), replay_step=-1) == cfg
    with pytest.raises(UserError, match=r"--replay_step=7: no such option; here it is python -m lab\.replay RUN STEP"):
        load_config(["--replay_step=7"])


def test_a_name_from_elsewhere_in_a_file(tmp_path):
    (tmp_path / "a.toml").write_text("learning_rate = 3e-4")
    with pytest.raises(UserError, match="no such key 'learning_rate'; here it is lr"):
        load_config([str(tmp_path / "a.toml")])


def test_every_rank_counts_in_the_micro_batch(monkeypatch):
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match=r"3 device\(s\)"):
        load_config([])


def test_a_mistake_is_one_line_and_exit_code_2():
    done = run_command("train.py", "config/small.toml", "--n_head=10")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: n_head = 10") and done.stderr.count("\n") == 1


def test_help_explains_every_field():
    done = run_command("train.py", "--help")
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in Config.model_fields)
    assert all(field.description for field in Config.model_fields.values())


def test_print_config_shows_what_would_run():
    import tomllib

    done = run_command("train.py", "config/tiny.toml", "config/carope.toml", "--seed=9", "--print_config")
    assert Config(**tomllib.loads(done.stdout)) == load_config(["config/tiny.toml", "config/carope.toml", "--seed=9"])
