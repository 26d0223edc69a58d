"""prepare_fineweb.py against a ten-line reference, through kills and restarts, and with everything that can be wrong."""

import gzip
import json
import os
import pydoc_data.topics
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Hold, wait_until
from hub import (
    COMMIT,
    FOLDER,
    REPO,
    ROOT,
    Fault,
    bytes_reference,
    contents,
    gpt2_reference,
    hub_reference,
    read_shards,
    run,
    serving,
    start,
    write_parquet,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_fineweb
from core.errors import UserError
from text import corpus
from text.sources import LocalFiles
from text.tokenizer import load_tokenizer

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where waiting for the disk is not the test
TOPICS = sorted(pydoc_data.topics.topics.values())


def write_jsonl(path, documents):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    return path


def error_of(*args):
    """The one line that the command, run in this process, ends with."""
    with pytest.raises(UserError) as caught:
        prepare_fineweb.prepare(prepare_fineweb.parse_args([str(a) for a in args]))
    message = str(caught.value)
    assert "\n" not in message
    return message


def prepare(*args):
    prepare_fineweb.prepare(prepare_fineweb.parse_args([str(a) for a in args]))


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """Four parquet files, 10 MB of prose; some documents are null, some empty, one in each file is longer than a shard."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("long")
    for i in range(4):
        documents = [None if draw.random() < 0.02 else "" if draw.random() < 0.02 else draw.choice(TOPICS) for _ in range(300)]
        documents[150] = "".join(draw.choices(TOPICS, k=100))
        write_parquet(folder / f"part-{i}.parquet", documents, row_group_size=150)
    return folder


LONG = ("--tokenizer", "gpt2", "--val_tokens", "50_000", "--shard_tokens", "90_000")


@pytest.fixture(scope="module")
def long_result(long_source, tmp_path_factory):
    """What an undisturbed run makes of it with two workers."""
    out = tmp_path_factory.mktemp("long-result") / "out"
    prepare("--source", long_source, "--out", out, "--workers", 2, *LONG)
    return out


# ---- the stream


def test_stream_is_the_reference(long_source, long_result):
    documents = [t for p in sorted(long_source.iterdir()) for t in pq.read_table(p)["text"].to_pylist()]
    shards = read_shards(long_result)
    assert shards == gpt2_reference(documents, 50_000, 90_000)
    manifest = json.loads((long_result / "manifest.json").read_text())
    assert manifest["documents"] == sum(bool(t) for t in documents)
    assert manifest["skipped"] == {"null": documents.count(None), "empty": documents.count("")}
    assert manifest["tokens"] == sum(map(len, shards))
    names = ["val_000000.bin", *(f"train_{i:06d}.bin" for i in range(1, len(shards)))]
    assert [s["file"] for s in manifest["shards"]] == names
    assert [s["split"] for s in manifest["shards"]] == ["val"] + ["train"] * (len(shards) - 1)
    for entry, shard in zip(manifest["shards"], shards, strict=True):
        assert entry["tokens"] == len(shard)
        assert entry["documents"] == shard.count(50256)
        assert entry["sha256"] == contents(long_result)[entry["file"]]
    assert set(contents(long_result)) == {*names, "manifest.json"}, "temporary files are left"


@pytest.mark.parametrize("workers", [1, 7])
def test_workers_do_not_change_a_byte(long_source, long_result, tmp_path, workers):
    prepare("--source", long_source, "--out", tmp_path / "out", "--workers", workers, *LONG)
    assert contents(tmp_path / "out") == contents(long_result)


def test_golden(tmp_path):
    """The published first tokens of GPT-2 for these words, and the borders of the shards."""
    write_jsonl(tmp_path / "a.jsonl", ["Hello world", None, "", "tiktoken is great!<|endoftext|>"])
    prepare("--source", tmp_path, "--out", tmp_path / "out", "--val_tokens", 4, "--shard_tokens", 9)
    hello, great = [15496, 995], [83, 1134, 30001, 318, 1049, 0, 27, 91, 437, 1659, 5239, 91, 29]
    stream = [50256, *hello, 50256, *great]
    assert read_shards(tmp_path / "out") == [stream[:4], stream[4:13], stream[13:]]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("ab \n'", max_size=40)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(texts | st.none(), max_size=8), min_size=1, max_size=3),
    val_tokens=st.integers(1, 30),
    shard_tokens=st.integers(1, 40),
    limit=st.none() | st.integers(31, 100),
    batch=st.sampled_from([1, 100, 1 << 18]),
    workers=st.integers(1, 3),
    name=st.sampled_from(["gpt2", "bytes"]),
    kind=st.sampled_from(["jsonl", "parquet"]),
)
def test_any_documents_any_sizes(monkeypatch, files, val_tokens, shard_tokens, limit, batch, workers, name, kind):
    monkeypatch.setattr("text.token_stream.BATCH_CHARS", batch)
    reference = gpt2_reference if name == "gpt2" else bytes_reference
    expected = reference([t for f in files for t in f], val_tokens, shard_tokens, limit=limit)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        source.mkdir()
        for i, documents in enumerate(files):
            (write_jsonl if kind == "jsonl" else write_parquet)(source / f"{i}.{kind}", documents)
        args = ["--source", source, "--out", out, "--tokenizer", name, "--workers", workers]
        args += ["--val_tokens", val_tokens, "--shard_tokens", shard_tokens, *(["--limit_tokens", limit] if limit else [])]
        if len(expected) < 2:
            assert "no text" in (message := error_of(*args)) or "nothing is left to train on" in message
            assert not out.exists()
        else:
            prepare(*args)
            assert read_shards(out) == expected


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab1 '\n\t\r\u3000\x1c.", max_size=80) | st.text(max_size=80),
    size=st.integers(1, 12),
    chunk=st.integers(1, 30),
)
def test_cut_documents_encode_as_whole_ones(text, size, chunk):
    pieces = list(corpus.cut((text[i : i + chunk] for i in range(0, len(text), chunk)), size))
    assert "".join(p.text for p in pieces) == text
    assert [p.first for p in pieces] == [True] + [False] * (len(pieces) - 1)
    for name in ("gpt2", "bytes"):
        encode = load_tokenizer(name).encode
        assert [i for p in pieces for i in encode(p.text)] == list(encode(text))


def test_all_kinds_of_files_and_their_order(tmp_path):
    zst = tmp_path / "b" / "4.jsonl.zst"
    zst.parent.mkdir()
    write_parquet(tmp_path / "z.parquet", ["parquet ü"])
    write_jsonl(tmp_path / "b" / "1.jsonl", ["plain", "lone \ud800 surrogate", "pair \ud83d\ude00"])
    write_jsonl(tmp_path / "b" / "2.jsonl.gz", ["gzip"])
    (tmp_path / "b" / "3.txt").write_bytes(b"text\r\nwith two lines\n")
    with pa.output_stream(zst, compression="zstd") as file:
        file.write(b'{"text": "zstd"}\n\n{"text": "second"}')
    (tmp_path / "b" / "notes.md").write_text("not taken")
    source = ["--source", tmp_path / "z.parquet", tmp_path / "b", "--source", tmp_path / "z.par*"]
    prepare(*source, "--out", tmp_path / "out", "--tokenizer=bytes", "--val-tokens=5", "--shard-tokens=1000")
    documents = ["parquet ü", "plain", "lone \ufffd surrogate", "pair 😀", "gzip", "text\r\nwith two lines\n", "zstd", "second"]
    assert read_shards(tmp_path / "out") == bytes_reference([*documents, "parquet ü"], 5, 1000)


def test_demo(tmp_path):
    job = prepare_fineweb.parse_args(["--source", "demo"])
    assert (job.out, job.tokenizer, job.val_tokens, job.shard_tokens) == (Path("data/demo"), "bytes", 200_000, 1_000_000)
    rc, _, err = run("--source", "demo", cwd=tmp_path)
    assert rc == 0, err
    shards = read_shards(tmp_path / "data/demo")
    assert len(shards[0]) == 200_000
    assert sum(map(len, shards)) > 1_500_000
    text = bytes(t for t in shards[1] if t < 256).decode(errors="replace")
    assert text.count(" the ") / len(text.split(" ")) > 0.02, "English prose has more of them"
    before = contents(tmp_path / "data/demo")
    prepare("--source", "demo", "--out", tmp_path / "data/demo")
    assert contents(tmp_path / "data/demo") == before


# ---- interruptions


APPEND = "text.token_stream:ShardFolder.append"  # a batch of 60,000 tokens
MOMENTS = {
    "nothing is written yet": ("text.token_stream:write_json", 1),
    "the first shard is begun": ("text.shard_writer:ShardWriter.write", 1),
    "a shard is whole, but not yet in its place": ("text.shard_writer:fsync_folder", 3),
    "a shard is in its place, but not yet on record": ("text.token_stream:write_json", 5),
    "all is encoded, the last shard is not closed": ("text.token_stream:ShardFolder.close", 1),
}


def test_killed_at_any_moment_and_started_again(long_source, long_result, tmp_path):
    out = tmp_path / "out"
    args = ("--source", long_source, "--out", out, "--workers", 2, *LONG)
    for moment, (where, nth) in MOMENTS.items():
        hold = Hold(tmp_path, where, nth)
        process = start(*args, env=hold.env)
        hold.reached(process)
        process.kill()
        process.communicate()
        assert not (out / "manifest.json").exists(), moment
    (out / ".train_000099.bin.tmp").write_bytes(b"left by a kill")
    rc, _, err = run(*args)
    assert rc == 0, err
    assert contents(out) == contents(long_result)


def test_a_lost_shard_is_made_again(long_source, long_result, tmp_path):
    out, hold = tmp_path / "out", Hold(tmp_path, APPEND, 12)
    process = start("--source", long_source, "--out", out, *LONG, env=hold.env)
    hold.reached(process)
    process.kill()
    process.communicate()
    (out / "train_000002.bin").write_bytes(b"damaged")
    prepare("--source", long_source, "--out", out, *LONG)
    assert contents(out) == contents(long_result)


def test_local_files_keep_one_token_in_a_hundred_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TOPICS))
    n_bytes = (tmp_path / "a.txt").stat().st_size
    job = prepare_fineweb.parse_args(["--source", str(tmp_path / "a.txt"), "--out", str(tmp_path / "o"), "--tokenizer=bytes"])
    prepare_fineweb.prepare(job)
    assert len(read_shards(tmp_path / "o")[0]) == n_bytes // 100


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_cleanly(long_source, long_result, tmp_path, number, code):
    out, hold = tmp_path / "out", Hold(tmp_path, APPEND, 8)
    args = ("--source", long_source, "--out", out, *LONG)
    process = start(*args, env=hold.env)
    hold.reached(process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert "the same command continues" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert {p.suffix for p in out.iterdir()} <= {".bin", ".json"}
    assert "other arguments" in error_of("--source", long_source, "--out", out, *LONG, "--tokenizer", "bytes")
    prepare(*args)
    assert contents(out) == contents(long_result)


def test_two_at_once(long_source, tmp_path):
    out, hold = tmp_path / "out", Hold(tmp_path, APPEND)
    process = start("--source", long_source, "--out", out, *LONG, env=hold.env)
    hold.reached(process)
    error = error_of("--source", long_source, "--out", out, *LONG)
    assert f"process {process.pid} on " in error and "prepare_fineweb.py" in error and "is at work there" in error
    process.terminate()
    process.communicate()
    assert process.returncode == 143


def test_finished_is_left_alone_and_other_arguments_refused(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["some words " * 20] * 20), tmp_path / "out"
    args = ["--source", source, "--out", out, "--val_tokens", 50, "--shard_tokens", 100]
    prepare(*args)
    times = {p: p.stat().st_mtime_ns for p in [out, *out.iterdir()]}
    prepare(*args, "--workers", 1)
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} | {out: times[out]} == times
    assert "shard_tokens was 100 and is now 99" in error_of(*args, "--shard_tokens", 99)
    assert "tokenizer was gpt2 and is now bytes" in error_of(*args, "--tokenizer", "bytes")
    write_jsonl(source, ["other words"] * 20)
    assert "files was" in error_of(*args)
    (out / "train_000002.bin").unlink()
    write_jsonl(source, ["some words " * 20] * 20)
    assert "train_000002.bin: missing or damaged" in error_of(*args)


def test_foreign_shards_are_not_mixed_with(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fineweb_train_000001.bin").write_bytes(b"llm.c's")
    source = write_jsonl(tmp_path / "a.jsonl", ["words"] * 20)
    assert "did not write" in error_of("--source", source, "--out", tmp_path / "out", "--val_tokens", 2)


def test_a_folder_stands_for_its_texts_and_those_it_links_to(tmp_path):
    """Not for what an editor keeps or a desktop threw away."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (
        "b/c.txt",
        "a.txt",
        ".hidden.txt",
        ".ipynb_checkpoints/a.txt",
        ".Trash-0/files/a.txt",
        "lost+found/a.txt",
        "x.csv",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("words")
    elsewhere.mkdir()
    for name in ("d.jsonl", "e.txt"):
        (elsewhere / name).write_text('{"text": "words"}')
    linked(folder / "linked", elsewhere)
    linked(folder / "z.txt", elsewhere / "e.txt")
    found = [str(path.relative_to(folder)) for path in LocalFiles([str(folder)]).paths]
    assert found == ["a.txt", "b/c.txt", "linked/d.jsonl", "linked/e.txt", "z.txt"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_read_however_arrow_stores_them(tmp_path, kind):
    texts = ["one", None, "two words", "", "one"]
    column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").schema_arrow.field("text").type == kind
    assert [piece.text for piece in corpus.read_pieces(tmp_path / "a.parquet")] == texts


# ---- bad input


def bad_parquet(path, columns, **names):
    pq.write_table(pa.table(columns, **names), path)
    return path


def linked(path, target):
    path.symlink_to(target)
    return path


def truncated(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def damaged(path):
    """Garble the pages in the middle and leave the footer whole."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 1000] = b"\xff" * 1000
    path.write_bytes(raw)
    return path


def written(path, content):
    path.write_bytes(content)
    return path


BAD = {
    "missing": (lambda d: d / "no.parquet", "no such file"),
    "empty glob": (lambda d: d / "*.parquet", "no such file"),
    "empty folder": (lambda d: d, "no such file"),
    "other kind": (lambda d: written(d / "a.md", b"x"), "must end in"),
    "no text column": (lambda d: bad_parquet(d / "a.parquet", {"content": ["x"], "id": [1]}), "its columns are content, id"),
    "two text columns": (
        lambda d: bad_parquet(d / "a.parquet", [pa.array(["x"])] * 2, names=["text", "text"]),
        "has 2 columns 'text'",
    ),
    "a link to nothing": (lambda d: linked(d / "more", d / "gone").parent, "more: a link to what is not there; mend it"),
    "a link to itself": (lambda d: linked(d / "again", d).parent, "again: a link back to"),
    "text of numbers": (lambda d: bad_parquet(d / "a.parquet", {"text": [1, 2]}), "holds int64, expected string"),
    "half a parquet": (lambda d: truncated(write_parquet(d / "a.parquet", TOPICS), 0.5), "a.parquet: not a readable parquet"),
    "empty parquet": (lambda d: written(d / "a.parquet", b""), "a.parquet: not a readable parquet"),
    "damaged parquet": (lambda d: damaged(write_parquet(d / "a.parquet", TOPICS)), "a.parquet: cannot be read to its end"),
    "half a gzip": (lambda d: truncated(write_jsonl(d / "a.jsonl.gz", TOPICS), 0.5), "a.jsonl.gz: cannot be read to its end"),
    "broken json": (lambda d: written(d / "a.jsonl", b'{"text": "x"}\n{"text": "y\n'), "a.jsonl, line 2: not JSON"),
    "no text key": (lambda d: written(d / "a.jsonl", b'\n{"body": "x"}\n'), "a.jsonl, line 2: expected an object"),
    "json list": (lambda d: written(d / "a.jsonl", b"[1]\n"), "a.jsonl, line 1: expected an object"),
    "text a number": (lambda d: written(d / "a.jsonl", b'{"text": 3}\n'), "a.jsonl, line 1: 'text' is int"),
    "json not utf-8": (lambda d: written(d / "a.jsonl", b'{"text": "\xe9"}\n'), "a.jsonl, line 1: not JSON"),
    "txt not utf-8": (lambda d: written(d / "a.txt", b"caf\xe9 au lait"), "a.txt: cannot be read to its end"),
    "no documents": (lambda d: write_jsonl(d / "a.jsonl", [None, "", None]), "only 2 null and 1 empty documents"),
    "empty txt": (lambda d: written(d / "a.txt", b""), "holds no text"),
    "all is validation": (lambda d: write_jsonl(d / "a.jsonl", ["few words"]), "nothing is left to train on"),
    "exactly validation": (lambda d: write_jsonl(d / "a.jsonl", ["x" * 99]), "nothing is left to train on"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    make, expected = BAD[case]
    source = tmp_path / "source"
    source.mkdir()
    message = error_of("--source", make(source), "--out", tmp_path / "out", "--tokenizer", "bytes", "--val_tokens", 100)
    assert expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--shard_tokens", "0"], "0 is not a whole number above 0"),
        (["--val_tokens=-5"], "-5 is not a whole number above 0"),
        (["--workers", "1.5"], "1.5 is not"),
        (["--shard_tokens", "3_000_000_000"], "above 2,147,483,647"),
        (["--limit_tokens", "50"], "nothing is left to train on"),
        (["--shard", "50"], "unrecognized arguments: --shard"),
        (["--tokenizer", "gpt4"], "there are gpt2, bytes"),
        (["--source", "hf://models/x"], "expected hf://datasets"),
    ],
)
def test_bad_arguments(tmp_path, args, expected):
    base = [] if "--source" in args else ["--source", write_jsonl(tmp_path / "a.jsonl", ["words"] * 100)]
    assert expected in error_of(*base, "--out", tmp_path / "out", "--val_tokens", 100, *args)


def test_text_that_tiktoken_refuses(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", " " * 1_000_000 + "x"])
    message = error_of("--source", source, "--out", tmp_path / "out", "--val_tokens", 10)
    assert message.startswith(f"{source}: a document cannot be encoded (")


def test_errors_of_the_command(tmp_path):
    """Through the real command: one line, exit 2."""
    (tmp_path / "file").write_text("")
    source = write_jsonl(tmp_path / "a.jsonl", ["words"] * 100)
    for words, folder in ((source, "file"), (tmp_path / "no.txt", "out")):
        rc, out, err = run("--source", words, "--out", tmp_path / folder, "--val_tokens", 10)
        assert (rc, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ")
    assert "say with --out" in error_of("--source", source)


def test_help_is_quick():
    command = [sys.executable, "-X", "importtime", "prepare_fineweb.py", "--help"]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert "--shard_tokens" in process.stdout
    for heavy in ("torch", "pyarrow", "huggingface_hub", "tiktoken", "datasets"):
        assert f" {heavy}\n" not in process.stderr


# ---- disk and memory


def test_too_little_disk_is_seen_before(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(TOPICS) * 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**7, 0, 10**6))
    message = error_of("--source", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "too little space" in message
    assert not (tmp_path / "out").exists()
    args = ["--source", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "bytes"]
    prepare(*args, "--val_tokens", 1000, "--limit_tokens", 3000)  # a limit makes it possible, and only that much is read
    assert read_shards(tmp_path / "out") == bytes_reference(["".join(TOPICS)], 1000, 2000)[:2]


def test_disk_full_while_writing(tmp_path):
    mount = ["unshare", "-rm", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=2m none {disk}"
    if subprocess.run([*mount, mounted], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    source = write_jsonl(tmp_path / "a.jsonl.gz", ["the same words " * 1000] * 300)  # its size tells nothing of what is in it
    flags = f"--source {source} --out {disk}/out --tokenizer bytes --val_tokens 100_000 --shard_tokens 500_000"
    script = f"{mounted}; {sys.executable} {ROOT}/prepare_fineweb.py {flags}; echo $? >&2; ls -A {disk}/out >&2"
    err = subprocess.run([*mount, script], capture_output=True, text=True).stderr.splitlines()
    at = next(i for i, line in enumerate(err) if line.startswith("error"))
    assert "train_000002.bin: cannot be written (No space left on device)" in err[at]
    assert err[at + 1] == "2"
    assert set(err[at + 2 :]) == {".progress.json", "val_000000.bin", "train_000001.bin"}


@pytest.mark.parametrize("kind", ["one row group", "few long rows", "one txt document"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    text = "".join(random.Random(0).choices(TOPICS, k=400))[:1_000_000]
    if kind == "one row group":
        source = write_parquet(tmp_path / "a.parquet", [text[i : i + 5000] for i in range(0, 1_000_000, 5000)] * 100)
    elif kind == "few long rows":
        noise = random.Random(0).randbytes(50_000_000).hex()  # that compression cannot make small
        rows = [str(i) for i in range(100_000)] + [noise[i : i + 200_000] for i in range(0, len(noise), 200_000)]
        source = write_parquet(tmp_path / "a.parquet", rows, row_group_size=len(rows), write_batch_size=8)
    else:
        source = tmp_path / "a.txt"
        source.write_text(text * 100)
    sizes = ("--val_tokens", 1000, "--shard_tokens", 200_000_000)
    process = start("--source", source, "--out", tmp_path / "out", "--tokenizer", "bytes", *sizes)
    peak, tree = 0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, sum(p.memory_info().rss for p in [tree, *tree.children(recursive=True)]))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    assert process.wait() == 0, process.stderr.read()
    assert peak < 300e6, f"{peak / 1e6:.0f} MB for 100 MB of text"


# ---- the hub


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path, *([f"document {i} {j} " + TOPICS[i + j] for j in range(10)] for i in range(3))) as server:
        yield server


SIZES = ("--tokenizer", "bytes", "--val_tokens", "10_000", "--shard_tokens", "20_000")


def test_hub_files_come_one_at_a_time_and_go_again(hub, tmp_path):
    env = {**hub.env, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    rc, _, err = run(*SIZES, env=env, cwd=tmp_path)
    assert rc == 0, err
    folder = tmp_path / "data/fineweb-edu-10B"
    assert read_shards(folder) == hub_reference(hub, 10_000, 20_000)
    assert hub.downloads == [f"{FOLDER}/00{i}_00000.parquet" for i in range(3)]
    assert hub.on_disk == [[], [], []], "a file was still there when the next was fetched"
    assert {p.suffix for p in folder.iterdir()} == {".bin", ".json"}
    assert not list((tmp_path / "home").rglob("*.parquet"))
    assert "Bearer hf_secret" in hub.tokens
    assert json.loads((folder / "manifest.json").read_text())["revision"] == COMMIT
    hub.shutdown()  # a finished folder asks nobody
    assert "finished already" in run(*SIZES, env=env, cwd=tmp_path)[1]


def test_hub_revision_is_pinned_through_a_kill(hub, tmp_path):
    env, names = {**hub.env, "HF_HOME": str(tmp_path / "home")}, sorted(n for n in hub.files if n.endswith("parquet"))
    hub.faults[names[1]] = [Fault(cut=0, hang=True)]
    process = start(*SIZES, env=env | {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}, cwd=tmp_path)
    wait_until(process, lambda: len(hub.downloads) == 2)
    process.kill()
    process.communicate()
    hub.downloads.clear()
    hub.head = COMMIT[::-1]  # the dataset was changed meanwhile
    rc, _, err = run(*SIZES, env=env, cwd=tmp_path)
    assert rc == 0, err
    assert names[2] in hub.downloads
    assert read_shards(tmp_path / "data/fineweb-edu-10B") == hub_reference(hub, 10_000, 20_000)
    assert json.loads((tmp_path / "data/fineweb-edu-10B/manifest.json").read_text())["revision"] == COMMIT


def test_hub_cache_is_used_and_kept(hub, tmp_path):
    env = {**hub.env, "HF_HOME": str(tmp_path / "home")}
    names = sorted(n for n in hub.files if n.endswith("parquet"))
    fetch = (
        f"from huggingface_hub import hf_hub_download as get; [get({REPO!r}, n, repo_type='dataset') for n in {names[:2]!r}]"
    )
    subprocess.run([sys.executable, "-c", fetch], env={**os.environ, **env}, check=True, capture_output=True)
    hub.downloads.clear()
    rc, _, err = run(*SIZES, env=env, cwd=tmp_path)
    assert rc == 0, err
    assert hub.downloads == names[2:]
    assert len(list((tmp_path / "home").rglob("*.parquet"))) == 2

    offline = {**env, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    rc, _, err = run("--out", tmp_path / "offline", *SIZES, env=offline)
    assert rc == 0, err
    del hub.files[names[2]]
    assert read_shards(tmp_path / "offline") == hub_reference(hub, 10_000, 20_000)
    assert len(list((tmp_path / "home").rglob("*.parquet"))) == 2


def test_hub_errors_are_one_line(hub, tmp_path):
    home = {"HF_HOME": str(tmp_path / "home")}
    hub.status = 401
    dead = {"HF_ENDPOINT": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1"}
    for env in (hub.env, dead, {"HF_HUB_OFFLINE": "1"}):
        rc, _, err = run(*SIZES, env={**home, **env}, cwd=tmp_path, constants={"FIRST_WAIT": 0.01})
        assert rc == 2
        *retries, err = err.splitlines()
        assert err.startswith(f"error: hf://datasets/{REPO}/{FOLDER}: ")
        assert len(retries) == (4 if env == dead else 0)
        assert all(word in err for word in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "--source"))
    hub.status = None
    rc, _, err = run("--source", f"hf://datasets/{REPO}/nowhere", "--out", tmp_path / "data", env={**home, **hub.env})
    assert (rc, err.count("\n")) == (2, 1)
    assert "404" in err
    assert not list((tmp_path / "data").rglob("*.bin"))
