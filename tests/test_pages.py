"""README and docs/: every block of commands or Python runs as it stands, or says above it why not.

    <!-- not run: needs a GPU -->      is such a line; another reason needs …, or hours

The blocks run in the order of their page in a folder like a checkout, where the configurations of sizes are toys and
data/fineweb-edu-10B is a small corpus. A run that a command names is trained first. What is not run is still parsed.
Python whose first line is a comment with the name of a file is written to that file, or, "continued", added to it.
"""

import importlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, fork_server, keep_remote_code, run_command, without_plugins

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCK = re.compile(r"(?:<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(page, *match.groups()) for page, text in PAGES.items() for match in BLOCK.finditer(text)]
TOY = {
    "data": "data/fineweb-edu-10B", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32, "vocab_size": 320, "steps": 101,
    "warmup_steps": 0, "lr": 1e-2, "min_lr": 1e-3, "micro_batch": 4, "tokens_per_step": 256, "eval_tokens": 500,
    "final_eval_tokens": 500, "device": "cpu", "dtype": "float32",
}  # fmt: skip
WORDS = [f"--{key}={value}" for key, value in TOY.items()]
TABLE = ["--sizes", "tiny", "--encodings", "rope", "--lengths", "32", "--max_tokens", "500", *WORDS, "--steps=2"]
MORE = {  # words that are added to a command which has these
    "lab.sweep": ["--dry_run", *WORDS],
    "table1.py --nproc": TABLE,
    "table1.py --seeds": TABLE,
    "lab.analyze freq": ["--max_tokens", "2048"],
    "lab.analyze intervene": ["--max_tokens", "4096"],
    "lab.analyze tasks": ["--examples", "4"],
    "eval_ppl.py": ["--max_tokens", "4096"],
    "prepare_fineweb.py demo": ["--limit_tokens", "30_000", "--val_tokens", "10_000"],
}
DONE: set[str] = set()  # commands that have run in the checkout


def words_of(line: str) -> list[str]:
    """What a shell makes of a line: quotes, patterns, comments."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def lines_of(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(corpus, tmp_path_factory) -> Path:
    """A folder in which the commands of the pages find what they name."""
    here = tmp_path_factory.mktemp("pages") / "checkout"
    (here / "config").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in ("config", "data", "runs") and path.name[0] != ".":
            (here / path.name).symlink_to(path)
    for path in (ROOT / "config").iterdir():
        text = path.read_text()
        if "n_layer" in text:
            text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in (tomllib.loads(text) | TOY).items())
        (here / "config" / path.name).write_text(text)
    (here / "data").mkdir()
    (here / "runs").mkdir()
    (here / "data/fineweb-edu-10B").symlink_to(corpus)
    return here


@pytest.fixture
def inside(checkout, monkeypatch):
    """The checkout as working directory; signal handlers and what plugins have registered are put back."""
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "executable", str(Path(fork_server()[-1]).with_name("python")))  # for what scripts start
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with without_plugins():
        yield checkout
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(monkeypatch, capfd, script: str, *words: str) -> None:
    """Run a script of ours in this process. Raises AssertionError, with its stderr, where it fails."""
    if script == "-m":
        script, *words = words
    monkeypatch.setattr(sys, "argv", [script, *words])
    code: object = 0
    module = script.removesuffix(".py")
    if (ROOT / module.replace(".", "/") / "__main__.py").exists():
        module += ".__main__"
    try:
        importlib.import_module(module).main()
    except SystemExit as left:
        code = left.code
    assert not code, f"{script} {words}: {capfd.readouterr().err}"


def train_what_is_named(monkeypatch, capfd, text: str) -> None:
    """Train the runs/SIZE-ENCODING that are named and not there."""
    for size, encoding in re.findall(r"\bruns/(tiny|small|demo)-(\w+)", text):
        if not Path(f"runs/{size}-{encoding}/checkpoints").exists():
            call(monkeypatch, capfd, "train.py", f"config/{size}.toml", f"config/{encoding}.toml")


def run_line(monkeypatch, capfd, line: str) -> None:
    """Run a line of a page: in this process, which has loaded torch, unless it starts processes of its own."""
    program, *words = words_of(line)
    if program == "make":
        assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode == 0
    elif program == "torchrun" or words[:2] in (["-m", "core.launch"], ["-m", "pytest"]):
        command = [*(["-m", "torch.distributed.run"] if program == "torchrun" else []), *words]
        if "pytest" in words:  # the tests have their turn elsewhere
            command += ["--collect-only", "--rootdir", ROOT]
        done = run_command(*command, cwd=Path.cwd())
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    else:
        assert program == "python", f"{line}: not known how to run it"
        begins_from = [word for word in words if word.startswith("--init_from=")]
        train_what_is_named(monkeypatch, capfd, " ".join(begins_from) if "train.py" in words else line)
        more = next((more for key, more in MORE.items() if set(key.split()) <= set(words)), [])
        call(monkeypatch, capfd, *words, *more)


@pytest.mark.parametrize(
    "page",
    [
        page if page in ("README.md", "docs/your-text.md") else pytest.param(page, marks=pytest.mark.slow)  # read first
        for page in PAGES
    ],
)
def test_every_block_runs(page, inside, monkeypatch, capfd):
    run_page(page, monkeypatch, capfd)


def run_page(page: str, monkeypatch, capfd) -> None:
    names: dict = {}
    for where, why_not, kind, block in BLOCKS:
        if where != page or why_not:
            continue
        if kind == "sh":
            for line in lines_of(block):
                command = line.split("#")[0].strip()
                if command not in DONE:  # pages repeat each other's
                    run_line(monkeypatch, capfd, line)
                DONE.add(command)
        elif "transformers" in block and not importlib.util.find_spec("transformers"):
            continue  # pip install -e '.[eval]'
        elif kind == "python" and (file := re.match(r"# (\w+\.py)(, continued)?\n", block)):
            there = Path(file[1]).read_text() if file[2] else ""
            Path(file[1]).write_text(f"{there}{block}\n\n")
        elif kind == "python":
            if "transformers" in block:  # the code beside the weights is copied there
                keep_remote_code(monkeypatch, Path("modules").absolute())
            train_what_is_named(monkeypatch, capfd, block)
            exec(compile(block, page, "exec"), names)


def test_what_is_not_run_says_what_it_needs():
    assert {kind for _, _, kind, _ in BLOCKS} <= {"sh", "python", "toml", "json", "bibtex"}, "write commands as sh"
    for page, why_not, _, _ in BLOCKS:
        assert why_not is None or re.match("needs |hours", why_not), f"{page}: {why_not}"
    assert sum(text.count("<!-- not run: ") for text in PAGES.values()) == sum(why_not is not None for _, why_not, *_ in BLOCKS)


NOT_RUN = [line for _, why_not, kind, block in BLOCKS if why_not and kind == "sh" for line in lines_of(block)]


@pytest.mark.parametrize("line", [line for line in NOT_RUN if re.match(r"python (\w+\.py|-m (core|lab)\.)|torchrun", line)])
def test_what_is_not_run_is_what_the_script_takes(line):
    import prepare_fineweb
    from core.config import load_config

    words = words_of(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("lab."))
    script, rest = words[at], words[at + 1 :]
    if script == "prepare_fineweb.py":
        prepare_fineweb.parse_args(rest)
    elif script == "train.py":
        load_config(rest)
    else:
        mode = rest[:1] if script in ("lab.bench", "lab.analyze") else []
        usage = run_command(script, *mode, "--help").stdout
        assert all(word.split("=")[0] in usage for word in rest if word.startswith("--"))


def test_the_mistakes_of_your_text_are_refused_as_the_page_says(inside, monkeypatch, capfd):
    page = "docs/your-text.md"
    rows = re.findall(r"^\| `python (\S+) (.*?)` \| `(.*?)` \|$", PAGES[page], re.MULTILINE)
    assert len(rows) >= 9
    if not Path("data/mine").exists():
        run_page(page, monkeypatch, capfd)
    for script, words, message in rows:
        capfd.readouterr()
        with pytest.raises(AssertionError) as refused:
            call(monkeypatch, capfd, script, *words.split())
        assert message.replace("\\|", "|") in str(refused.value), f"{script} {words}"
        assert "Traceback" not in str(refused.value) and not Path("data/new/manifest.json").exists()


@pytest.mark.parametrize("name", ["halves", "log_rope", "square_root", "budget"])
def test_the_examples_of_new_encoding_pass_what_the_registry_passes(name, inside, monkeypatch, capfd):
    import test_positional

    run_page("docs/new-encoding.md", monkeypatch, capfd)
    test_positional.test_no_gradient_flows_from_a_position_to_later_tokens(name)
    test_positional.test_decoding_with_the_cache_equals_the_full_forward_also_past_the_training_length(name)
    test_positional.test_every_parameter_is_initialized_and_the_rest_of_the_model_starts_the_same(name)
    test_positional.test_every_parameter_of_the_encoding_learns_from_the_start(name)
