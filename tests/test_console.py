"""What commands say: nothing but results with --quiet, lines without escapes in a log, a bar on a terminal, help at once."""

import os
import pty
import termios
from pathlib import Path

import pytest
from conftest import ROOT, obey_modes, run_command, start_command

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text())
TOY = ["--n_layer=1", "--micro_batch=4", "--tokens_per_step=256", "--steps=4", "--eval_tokens=200", "--final_eval_tokens=200"]


def words(script: str, corpus: Path, runs: Path, out: Path) -> list[object]:
    """A command line for each script that has something to do without more packages."""
    here = [f"--data={corpus}", f"--out_dir={out}", "--device=cpu"]
    return {
        "prepare_fineweb.py": ["--source", "demo", "--tokenizer", "bytes", "--out", out / "d", "--limit_tokens", 9000,
                               "--val_tokens", 3000, "--shard_tokens", 3000],
        "train.py": ["config/lab.toml", *here, *TOY, "--wandb=offline", "--name=r"],
        "eval_ppl.py": [runs / "carope", "--lengths", 32, "--max_tokens", 500],
        "sample.py": [runs / "carope", "--prompt", "A", "--max_new_tokens", 5],
        "table1.py": ["--sizes", "lab", "--encodings", "rope", "--lengths", 64, "--max_tokens", 500, *here, *TOY],
        "lab.sweep": ["--encodings", "rope", "--seeds", 1, "--lengths", 64, "--max_tokens", 500, *here, *TOY],
        "lab.analyze": ["freq", runs / "carope", "--max_tokens", 500, "--out", out / "a"],
        "lab.report": [runs / "carope", "-o", out / "r.html", "--samples", 0],
        "lab.export_hf": [runs / "rope" if (runs / "rope").exists() else runs / "carope", out / "hf"],
    }[script]  # fmt: skip


QUIET = {  # how many lines of results a script prints on stdout
    "prepare_fineweb.py": range(1, 2), "train.py": range(1), "eval_ppl.py": range(1, 9), "sample.py": range(1, 9),
    "table1.py": range(1, 12), "lab.sweep": range(1, 16), "lab.analyze": range(1, 2), "lab.report": range(1, 2),
    "lab.export_hf": range(1, 2),
}  # fmt: skip


@pytest.mark.parametrize("script", QUIET)
def test_with_quiet_there_are_results_and_nothing_else(script, corpus, runs, tmp_path):
    done = run_command(script, *words(script, corpus, runs, tmp_path), "--quiet", env={"WANDB_SILENT": "false"})
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) in QUIET[script] and "\x1b" not in done.stdout


def test_quiet_keeps_errors(tmp_path):
    done = run_command("train.py", f"--data={tmp_path / 'none'}", "--quiet", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


UNWRITABLE = {  # a command line for each script that writes where it is told, without the place
    "eval_ppl.py": ["{run}", "--lengths", "32", "--json"], "lab.report": ["{run}", "-o"], "lab.export_hf": ["{run}"],
    "table1.py": ["--sizes", "lab", "--out"], "lab.sweep": ["--json"], "lab.analyze": ["freq", "{run}", "--out"],
    "lab.bench": ["scaling", "--json"], "lab.eval_tasks": ["{run}", "--tasks=a", "--json"],
    "prepare_fineweb.py": ["--source=demo", "--out"],
}  # fmt: skip


@pytest.mark.parametrize(
    "script",
    [name if name in ("eval_ppl.py", "lab.sweep") else pytest.param(name, marks=pytest.mark.slow) for name in UNWRITABLE],
)
def test_what_cannot_be_written_is_refused_before_the_work(script, runs, tmp_path):
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro").chmod(0o555)
    command = [word.format(run=runs / "carope") for word in UNWRITABLE[script]]
    done = run_command(script, *command, tmp_path / "ro/x", real=True, preexec_fn=obey_modes)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/ro/x: cannot be ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("other", ["/dev/null", "{tmp}"])
def test_a_device_or_a_folder_is_not_replaced_by_a_file(other, runs, tmp_path):
    done = run_command("eval_ppl.py", runs / "carope", "--lengths", 32, "--json", other.format(tmp=tmp_path))
    assert done.returncode == 2 and "give the name of a file" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_end_is_one_line(runs, tmp_path):
    """As where a file may have no more than 100 bytes."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); import signal, runpy, sys; "
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv[:] = sys.argv[1:]; "
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [ROOT / "eval_ppl.py", runs / "carope", "--lengths", 32, "--max_tokens", 500, "--json", tmp_path / "x.json"]
    done = run_command("-c", limit, *words, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: {tmp_path}/x.json: File too large", done.stderr
    assert list(tmp_path.iterdir()) == []


NOT_UTF_8 = {
    "eval_ppl.py": ["{bad}"], "lab.report": [".", "-o", "{bad}"], "train.py": ["--data={bad}"],
    "prepare_fineweb.py": ["--source", "{folder}", "--out", "{folder}/d"],
}  # fmt: skip


@pytest.mark.parametrize("script", NOT_UTF_8)
def test_a_name_that_is_not_utf_8_is_refused(script, tmp_path):
    bad = tmp_path / os.fsdecode(b"n\xff.txt")
    bad.write_text("words")
    done = run_command(script, *(word.format(bad=bad, folder=tmp_path) for word in NOT_UTF_8[script]), "--quiet")
    assert done.returncode == 2 and "not UTF-8" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_home_is_known_by_its_sign(corpus, tmp_path):
    (tmp_path / "data").symlink_to(corpus)
    (tmp_path / "own.toml").write_text('data = "~/data"\n')
    done = run_command("train.py", "~/own.toml", "--out_dir=~/runs", "--print_config", env={"HOME": str(tmp_path)})
    assert f'data = "{tmp_path}/data"' in done.stdout and f'out_dir = "{tmp_path}/runs"' in done.stdout, done.stderr
    done = run_command("prepare_fineweb.py", "--source=demo", "--out=~/d", "--limit_tokens=9000", "--val_tokens=3000",
                       env={"HOME": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "d/manifest.json").exists(), done.stderr


@pytest.mark.parametrize(
    "script", ["core.launch", *(pytest.param(f"lab.{n}", marks=pytest.mark.slow) for n in ("bench", "analyze"))]
)
def test_help_survives_python_without_docstrings(script):
    plain, bare = (run_command(script, "--help", env=env, real=True) for env in ({}, {"PYTHONOPTIMIZE": "2"}))
    assert bare.returncode == 0 and "None" not in bare.stdout and plain.stdout.splitlines()[-1] == bare.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["prepare_fineweb.py", "train.py", "eval_ppl.py"])
def test_a_log_gets_lines_without_escapes(script, corpus, runs, tmp_path):
    done = run_command(script, *words(script, corpus, runs, tmp_path), env={"WANDB_SILENT": "false"})
    said = done.stdout + done.stderr
    assert done.returncode == 0 and said and "\x1b" not in said and "\r" not in said
    if script == "train.py":
        assert [line.split(":")[0] for line in said.splitlines() if line.startswith("step ")][-1] == "step 4/4"


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_a_terminal_gets_a_bar_unless_it_is_to_be_quiet(options, corpus, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    words = ["config/lab.toml", f"--data={corpus}", f"--out_dir={tmp_path}", "--device=cpu", *TOY, *options]
    child = start_command("train.py", *words, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert child.wait() == 0
    if options:
        assert said == b""
    else:
        assert b"4/4" in said and b"\r" in said and b"step" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples(script):
    done = run_command(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout or f"python -m {script}" in done.stdout or f"{script} config/" in done.stdout
    assert script == "core.launch" or "--quiet" in done.stdout


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "core.launch"])
def test_an_option_that_is_not_there_is_one_line(script, runs):
    run = runs / "carope"
    needed = {
        "prepare_fineweb.py": [], "train.py": [], "table1.py": [], "lab.sweep": [], "lab.bench": ["decode"],
        "lab.analyze": ["freq", run], "lab.export_hf": [run, "out"], "lab.eval_tasks": [run, "--tasks=piqa"],
    }  # fmt: skip
    done = run_command(script, *needed.get(script, [run]), "--no_such_option=1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "no_such_option" in done.stderr
