"""--plugin: an encoding from a file that the command line names, in every script, and told apart from what it was before."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, Hold, run_command, start_command, without_plugins
from test_pages import BLOCKS

from core.config import Config, load_config, options
from core.errors import UserError
from core.fingerprint import is_users
from core.plugins import load, plugin_words
from positional import ENCODINGS

SLOW = """
    import torch
    from positional import Option, RoPE, register

    FACTOR = torch.tensor(float(open(__file__.replace("slow_rope.py", "factor.txt")).read()))

    @register("slow_rope")
    class SlowRoPE(RoPE):
        \"\"\"RoPE on a slower clock.\"\"\"

        options = (Option("slow_rope_speed", 0.5, "speed of the clock", gt=0, le=1),)

        def __init__(self, cfg):
            super().__init__(cfg)
            self.speed = cfg.slow_rope_speed

        def coords(self, x_BTC, pos_T, last=None):
            return super().coords(x_BTC, pos_T, last) * self.speed * FACTOR
"""
ONE = "from positional import Option, RoPE, register\n@register('mine')\nclass Mine(RoPE):\n    options = {}\n"
SCALE = [
    "--n_layer=1", "--n_embd=16", "--n_head=2", "--steps=2", "--warmup_steps=0", "--eval_tokens=500", "--final_eval_tokens=500",
    "--micro_batch=4", "--tokens_per_step=256", "--device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def as_before():
    with without_plugins():
        yield


def written(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def slow(tmp_path) -> Path:
    """A plugin with an option, and a number from a file that no hash of code knows."""
    (tmp_path / "factor.txt").write_text("1.0")
    return written(tmp_path / "slow_rope.py", SLOW)


@pytest.fixture
def words(slow, corpus, tmp_path) -> list[str]:
    """A sweep of its encoding, seconds long."""
    grid = ["--encodings", "slow_rope", "--lengths", "64", "--max_tokens", "500"]
    return ["lab.sweep", *grid, f"--data={corpus}", f"--out_dir={tmp_path / 'runs'}", *SCALE, "--plugin", str(slow)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from positional import RoPE\nx = 1\n", "registers no encoding"),
        ("x = 1\n\nclass (:\n", ", line 3: SyntaxError: invalid syntax"),
        ("x = 1\nimport no_such_module\n", ", line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)\n", ", line 1: SystemExit: 3"),
        (
            'from positional import RoPE, register\nregister("mine")(RoPE)\n@register("rope")\nclass B(RoPE): pass\n',
            ", line 3: ValueError: 'rope' is the name of positional.rotary.RoPE already; give this one another",
        ),
        ('from positional import RoPE, register\nregister("Mine!")(RoPE)\n', "'Mine!': the name of an encoding has lower-case"),
        ('from positional import register\n@register("mine")\ndef f(): pass\n', ", line 2: TypeError: 'mine': <function f at "),
        (ONE.format('Option("mine_x", 1, "x")'), "Mine.options: must be a tuple of Option; is a comma missing?"),
        (ONE.format('(Option("mine_x", 0, "x", gt=0),)'), "option 'mine_x': its default 0 is beyond its own limits"),
        (ONE.format('(Option("mine_x", "c", "x", choices=("a", "b")),)'), "option 'mine_x': its default 'c' is beyond its own"),
        (ONE.format('(Option("mine_x", "c", "x", ge=1),)'), "option 'mine_x': its default 'c' is beyond its own limits"),
        (ONE.format('(Option("mine_x", 6, "x", multiple_of=4),)'), "option 'mine_x': its default 6 is beyond its own limits"),
        (
            ONE.format('(Option("mine_x", None, "x"),)'),
            "option 'mine_x': its default None must be a bool",
        ),
        (ONE.format('(Option("mine-x", 1, "x"),)'), "option 'mine-x': its name must have lower-case letters"),
    ],
)
def test_a_plugin_that_fails_is_one_line_and_leaves_nothing(text, message, tmp_path):
    path, before = written(tmp_path / "bad.py", text), ENCODINGS.copy()
    for _ in range(2):
        with pytest.raises(UserError, match=r"--plugin .*bad\.py") as refused:
            load(str(path))
        assert message in str(refused.value) and before == ENCODINGS and not plugin_words()
    done = run_command("train.py", "--plugin", path, "--print_config")
    assert done.returncode == 2 and done.stderr.startswith("error: --plugin ") and done.stderr.count("\n") == 1, done.stderr


def test_a_plugin_that_is_not_there_or_has_the_name_of_another(slow, tmp_path):
    with pytest.raises(UserError, match=r"none.py: cannot be read \(No such file or directory\); give a Python file"):
        load(str(tmp_path / "none.py"))
    (tmp_path / "other").mkdir()
    for _ in range(2):
        load(str(slow))  # the second time it is there
    with pytest.raises(UserError, match=r"slow_rope\.py has the same name; rename one of the two"):
        load(shutil.copy(slow, tmp_path / "other"))


def test_options_are_known_where_the_class_is(slow):
    with pytest.raises(UserError, match=r"--slow_rope_speed=0\.5: no such option"):
        load_config(["--slow_rope_speed=0.5"])
    cfg = load_config(["--slow_rope_speed=0.25", f"--plugin={slow}", "--encoding=slow_rope"])
    assert (cfg.own_options, cfg.name) == ({"rope_base": 10000.0, "slow_rope_speed": 0.25}, "gpt2-slow_rope")
    with pytest.raises(UserError, match=r"slow_rope_speed = '2' \(command line\): input should be less than or equal to 1"):
        load_config(["--slow_rope_speed=2"])
    assert "slow_rope_speed" not in load_config(["--slow_rope_speed=0.25"]).model_dump()  # of rope
    usage = run_command("train.py", "--help", "--plugin", slow, env={"COLUMNS": "200"}).stdout
    assert "slow_rope: speed of the clock [default: 0.5]" in usage


@pytest.mark.parametrize("name", ["lr", "plugin", "slow_rope_speed"])
def test_an_option_that_has_the_name_of_another_is_refused(name, slow, tmp_path):
    load(str(slow))
    text = (
        SLOW.replace("slow_rope.py", "other.py")
        .replace("slow_rope_speed", name)
        .replace('"slow_rope"', '"other"')
        .replace("0.5", "0.75")
    )
    with pytest.raises(UserError, match=f"{name}: of encoding 'other', is the name of another option; call it otherwise"):
        load_config([f"--plugin={written(tmp_path / 'other.py', text)}"])


def test_no_field_of_the_configuration_is_an_encodings():
    assert not Config.model_fields.keys() & options().keys() and len(options()) >= 17
    for name, cls in ENCODINGS.items():
        assert load_config([f"--encoding={name}"]).own_options == {option.name: option.default for option in cls.options}


def test_a_sweep_refuses_seeds_of_another_computation_under_one_name(words, slow, tmp_path):
    """By the hash of what has changed in the class, by the probe of what has changed elsewhere; another comment is neither."""
    first = run_command(*words, "--seeds", "1")
    assert first.returncode == 0, first.stderr
    run, report = tmp_path / "runs/lab-slow_rope", tmp_path / "runs/lab.json"
    state = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())
    assert state["source"].startswith("syntax:") and state["probe"].keys() == {"loss", "grad_norm"}
    (record,) = json.loads(report.read_text())["runs"]
    assert record["probe"] == state["probe"] and record["options"] == {"rope_base": 10000.0, "slow_rope_speed": 0.5}
    kept = report.read_bytes()

    def refused(message: str, *more: str) -> None:
        for gone in (False, True):  # the run's state says it, and so does the report alone
            if gone:
                run.rename(tmp_path / "away")
            again = run_command(*words, "--seeds", "1", "2", *more)
            assert again.returncode == 2 and message in again.stderr and again.stderr.count("\n") == 1, again.stderr
            assert not (tmp_path / "runs/lab-slow_rope-s2").exists() and report.read_bytes() == kept
        (tmp_path / "away").rename(run)

    written(slow, SLOW.replace("* self.speed *", "* (0.5 * self.speed) *"))
    refused("'slow_rope' is not what it was, its code has changed; ")
    written(slow, SLOW)
    (tmp_path / "factor.txt").write_text("1.01")
    refused("'slow_rope' is not what it was, it computes something else on the same input; ")
    (tmp_path / "factor.txt").write_text("1.0")
    run.rename(tmp_path / "away")
    again = run_command(*words, "--seeds", "2", "--slow_rope_speed=0.75")
    assert again.returncode == 2 and "its options were {" in again.stderr and report.read_bytes() == kept, again.stderr
    (tmp_path / "away").rename(run)

    written(slow, SLOW.replace("RoPE on a slower clock.", "Words.").replace("speed of the clock", "of the clock"))
    done = run_command(*words, "--seeds", "1", "2")
    assert done.returncode == 0 and len(json.loads(report.read_text())["runs"]) == 2, done.stderr


HASHED = """
import functools
import torch
import beside
from positional import RoPE, register

LIST, DICT, TABLE, NOTHING = [1, 2], {"k": 1}, torch.tensor([1.0, 2.0]), None
FUNCTIONS = (torch.sin, torch.cos)
PICKED = (lambda x: x, abs)

def plain(x):
    return x + 1

MADE = functools.partial(plain)

@functools.cache
def cached(x):
    return x + 2

def make(s):
    class Made(RoPE):
        def coords(self, x_BTC, pos_T, last=None):
            return super().coords(x_BTC, pos_T, last) * s * beside.F

    return Made

@register("hashed")
class Hashed(RoPE):
    def frame(self, at):
        return LIST, DICT, TABLE, NOTHING, FUNCTIONS, PICKED, MADE(1), cached(2), beside.F

register("two")(make(2))
register("three")(make(3))
"""


HASHES = """
import json, os, sys
from core.fingerprint import source_of
from core.plugins import load
for folder in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    load(f"{folder}/hashed.py")
    print(json.dumps({name: source_of(name) for name in ("hashed", "two", "three")}), flush=True)
    os._exit(0)
"""


def test_the_hash_sees_whatever_a_plugin_computes_with_and_is_the_same_in_every_process(tmp_path):
    def hashes(*plugins: tuple[str, str]) -> list[dict[str, str]]:
        """Of each plugin, with what lies beside it; each in a process of its own, which all come from one that is new."""
        folders = [tmp_path / str(n) for n in range(len(plugins))]
        for folder, (text, beside) in zip(folders, plugins, strict=True):
            folder.mkdir(exist_ok=True)
            (folder / "hashed.py").write_text(text)
            (folder / "beside.py").write_text(beside)
        done = run_command("-c", HASHES, *folders, env={"PYTHONDONTWRITEBYTECODE": "1"})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    changes = [
        ("[1, 2]", "[1, 3]"), ('"k": 1', '"k": 2'), ("[1.0, 2.0]", "[1.0, 3.0]"), (", None", ", 0"),
        ("torch.sin", "torch.tan"), ("lambda x: x", "lambda x: -x"), ("x + 1", "x + 3"), ("x + 2", "x + 3"),
    ]  # fmt: skip
    reworded = "# other words\n" + HASHED.replace("(x):\n    return x + 1", "(x):\n    # why\n    return x + 1")
    texts = [reworded, *(HASHED.replace(before, after) for before, after in changes)]
    first, same, *changed, all_changed = hashes((HASHED, "F = 1"), *((text, "F = 1") for text in texts), (HASHED, "F = 2"))
    assert first == same == hashes((HASHED, "F = 1"))[0] and len(set(first.values())) == 3
    for found, change in zip(changed, changes, strict=True):
        assert found["hashed"] != first["hashed"], change
    assert all(all_changed[name] != first[name] for name in first)


def test_what_is_installed_below_a_plugins_folder_is_not_the_users(tmp_path):
    """A plugin often lies beside an environment, which may be a link to another."""
    (tmp_path / ".venv").symlink_to(Path(torch.__file__).parents[4])
    (tmp_path / "near.py").write_text("import math\nimport torch\nimport positional\n" + ONE.partition("\n")[2].format("()"))
    (tmp_path / "near.py").write_text("from positional import Option, RoPE, register\n" + (tmp_path / "near.py").read_text())
    load(str(tmp_path / "near.py"))
    here = {name for name, module in sys.modules.items() if is_users(module)}
    assert here == {"plugin_near"}
    sibling = ModuleType("torch")
    sibling.__file__ = str(tmp_path / ".venv/lib/python3.11/site-packages/torch/__init__.py")
    assert not is_users(sibling)


def test_a_plugin_that_changes_while_a_sweep_runs_ends_it(words, slow, tmp_path):
    """No later run is trained by the new file; one that was is named, and no number of it is kept."""
    load(str(slow))
    written(slow, SLOW.replace("* self.speed", "* 0.3"))
    with pytest.raises(UserError, match=r"slow_rope\.py: has changed since this command began; start it again"):
        plugin_words()
    hold = Hold(tmp_path, "core.optim:set_lr", 1)
    written(slow, SLOW)
    child = start_command(*words, "--seeds", "1", "2", env=hold.env)
    hold.reached(child)
    written(slow, SLOW.replace("* self.speed", "* 0.3"))
    hold.release()
    said = child.communicate()[1]
    assert child.returncode == 2 and "slow_rope.py: has changed since this command began" in said, said
    assert not (tmp_path / "runs/lab-slow_rope-s2").exists()


def test_a_run_that_other_code_continues_says_so(slow, corpus, tmp_path):
    words = ["train.py", "config/demo.toml", "--encoding=slow_rope", f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]
    assert run_command(*words, "--plugin", slow).returncode == 0
    (tmp_path / "factor.txt").write_text("1.01")
    for script in (words, ["eval_ppl.py", tmp_path / "demo-slow_rope", "--lengths", "32", "--max_tokens", "500"]):
        done = run_command(*script, "--plugin", slow)
        assert done.returncode == 0 and "it computes something else on the same input" in done.stderr, done.stderr


def test_nothing_runs_because_a_run_folder_names_it(slow, corpus, tmp_path):
    words = ["train.py", "config/demo.toml", "--encoding=slow_rope", f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]
    assert run_command(*words, "--plugin", slow).returncode == 0
    written(slow, f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    run = tmp_path / "demo-slow_rope"
    for script in (["eval_ppl.py", run], ["sample.py", run], ["lab.export_hf", run, tmp_path / "out"], ["lab.report", run]):
        run_command(*script, cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_ranks_and_children_take_it_along(slow, corpus, tmp_path):
    """By table1.py on two processes: training, evaluation and preflight; and by the benchmark."""
    words = [f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE, "--tokens_per_step=512", "--plugin", str(slow)]
    table = ["--sizes", "demo", "--encodings", "slow_rope", "--lengths", "64", "--max_tokens", "500", "--nproc", "2"]
    for more in (["--preflight"], []):
        done = run_command("table1.py", *table, *words, *more)
        assert done.returncode == 0 and "slow_rope" in done.stdout, done.stderr
    bench = ["train", "config/demo.toml", "--encodings", "slow_rope", "--rounds", "1", "--synthetic"]
    done = run_command("lab.bench", *bench, "--device=cpu", "--plugin", slow, *SCALE[:3])
    assert done.returncode == 0 and "slow_rope" in done.stdout, done.stderr


@pytest.mark.slow
def test_an_exported_plugin_computes_the_same_in_transformers(slow, corpus, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from conftest import keep_remote_code

    from core.checkpoint import load_model

    written(slow, re.sub(r"FACTOR = .*", "FACTOR = 1.0", SLOW))
    words = ["train.py", "config/demo.toml", "--encoding=slow_rope", f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE]
    assert run_command(*words, "--plugin", slow).returncode == 0
    done = run_command("lab.export_hf", tmp_path / "demo-slow_rope", tmp_path / "hf", "--plugin", slow)
    assert done.returncode == 0, done.stderr
    keep_remote_code(monkeypatch, tmp_path / "modules")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    load(str(slow))
    ours, _, _ = load_model(tmp_path / "demo-slow_rope")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids)[..., : theirs.config.vocab_size], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_steps_of_new_encoding_into_the_repository(corpus, tmp_path):
    """In a copy: the page's file goes into positional/, and is found by --help, training, the tables and the tests."""
    copy = tmp_path / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("results/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    blocks = [block for page, _, _, block in BLOCKS if page == "docs/new-encoding.md" and block.startswith("# mine.py")]
    (copy / "positional/mine.py").write_text("\n\n".join(blocks))
    (copy / "config/log_rope.toml").write_text('# RoPE on the logarithm\nencoding = "log_rope"\n')

    def run(*words: object) -> str:
        done = run_command(*words, cwd=copy, real=True, env={"PYTHONPATH": "", "FORK_SERVER": ""})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("train.py", "config/demo.toml", "config/log_rope.toml", f"--data={corpus}", f"--out_dir={tmp_path}", *SCALE)
    state = json.loads(next(tmp_path.glob("demo-log_rope/checkpoints/*/state.json")).read_text())
    assert state["config"]["log_rope_scale"] == 32.0 and state["plugin"] is None
    run("-m", "lab.pages", "docs/encodings.md", "README.md")
    page, readme = (copy / "docs/encodings.md").read_text(), (copy / "README.md").read_text()
    assert all(f"| `{name}` | " in page and f"`{name}`" in readme for name in ("halves", "log_rope", "square_root", "budget"))
    tests = ["tests/test_positional.py", "tests/test_config.py"]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "halves or log_rope or square_root or budget", *tests)
    assert said.count(".") > 20, said
