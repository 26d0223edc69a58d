"""prepare_fineweb.py --source OWNER/NAME, --config, --split, --column; csv, json, arrow and what save_to_disk writes."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, CONVERTED, Fault, bytes_reference, contents, read_shards, run, serving_files, write_parquet
from test_prepare import error_of, prepare, write_jsonl

from text.corpus import read_pieces

TEXTS = ["one", None, 'two\nlines, "quoted"', "", "007", "NA", "null", "2020-01-01", "é 😀"] * 20
ROWS = [{"id": i, "text": text, "more": [i]} for i, text in enumerate(TEXTS)]
SIZES = ("--tokenizer", "bytes", "--val_tokens", 500, "--shard_tokens", 600)


def write_csv(path, separator=","):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in ROWS)])


def write_arrow(path, kind=pa.string(), new=pa.ipc.new_file):  # noqa: B008
    column = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(TEXTS, kind)
    table = pa.table({"text": column})
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=50):
            writer.write_batch(batch)


WRITERS = {
    "a.csv": write_csv,
    "a [1]*.csv": write_csv,  # a name, not a pattern
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.csv.gz": lambda path: (write_csv(path), path.write_bytes(gzip.compress(path.read_bytes()))),
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: write_jsonl(path, TEXTS),
    "array.json.bz2": lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "array.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "file.arrow": write_arrow,
    "stream.arrow": lambda path: write_arrow(path, new=pa.ipc.new_stream),
    "dictionary.arrow": lambda path: write_arrow(path, pa.dictionary(pa.int32(), pa.string())),
    "large.arrow": lambda path: write_arrow(path, pa.large_string()),
    "view.arrow": lambda path: write_arrow(path, pa.string_view()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_its_texts(tmp_path, name):
    WRITERS[name](tmp_path / name)
    texts = [piece.text for piece in read_pieces(tmp_path / name)]
    assert texts == ([text or "" for text in TEXTS] if "sv" in name else TEXTS)  # csv cannot say null


def test_csv_becomes_shards_by_name_and_by_pattern(tmp_path):
    (tmp_path / "texts").mkdir()
    write_csv(tmp_path / "texts/a.csv")
    (tmp_path / "texts/settings.json").write_text("{}")
    for i, source in enumerate(("texts/a.csv", "texts/*.csv")):
        prepare("--source", tmp_path / source, "--out", tmp_path / f"out-{i}", *SIZES)
        assert read_shards(tmp_path / f"out-{i}") == bytes_reference([text or "" for text in TEXTS], 500, 600)
    message = error_of("--source", tmp_path / "texts", "--out", tmp_path / "c", *SIZES)
    assert "no such file, and no folder or pattern with .parquet" in message and "'texts/*.csv'" in message


def test_another_column_and_its_change_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["wrong"] * 180, "body": TEXTS}), tmp_path / "a.parquet")
    with open(tmp_path / "b.jsonl", "w") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in TEXTS)
    args = ["--source", tmp_path, "--out", tmp_path / "out", *SIZES]
    prepare(*args, "--column", "body")
    assert read_shards(tmp_path / "out") == bytes_reference(TEXTS * 2, 500, 600)
    assert "column was body and is now text" in error_of(*args)
    assert "column 'nothing'; its columns are text, body; --column NAME" in error_of(
        *args[:3], tmp_path / "o", "--column=nothing"
    )


def test_a_folder_made_before_there_was_a_choice_of_columns_is_known(tmp_path, capsys):
    args = ["--source", write_jsonl(tmp_path / "a.jsonl", TEXTS), "--out", tmp_path / "out", *SIZES]
    prepare(*args)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    old = {key: value for key, value in manifest.items() if key not in ("column", "config", "split")}
    (tmp_path / "out/manifest.json").write_text(json.dumps(old))
    prepare(*args)
    assert "finished already" in capsys.readouterr().out
    assert "column was text and is now body" in error_of(*args, "--column", "body")


@pytest.mark.parametrize("wrong", [{"files": [["a.jsonl"]]}, {"files": [None]}, {"val_tokens": "many"}, {"column": 1}])
def test_a_damaged_progress_file_is_one_line(tmp_path, wrong):
    args = ["--source", write_jsonl(tmp_path / "a.jsonl", TEXTS), "--out", tmp_path / "out", *SIZES]
    prepare(*args)
    manifest = tmp_path / "out/manifest.json"
    kept = json.loads(manifest.read_text()) | {"shards": []} | wrong
    manifest.unlink()
    (tmp_path / "out/.progress.json").write_text(json.dumps(kept))
    assert f".progress.json: damaged ({next(iter(wrong))}" in error_of(*args)


def test_what_save_to_disk_writes(tmp_path):
    whole, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list([{"text": "other words " * 100}] * 9)
    whole.filter(lambda row: row["id"] % 2).save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": other}).save_to_disk(tmp_path / "splits")
    for folder, split, texts in (
        ("one", [], TEXTS[1::2]),
        ("splits", [], TEXTS),
        ("splits", ["--split", "test"], ["other words " * 100] * 9),
    ):
        out = tmp_path / f"out-{folder}-{len(split)}"
        prepare("--source", tmp_path / folder, "--out", out, "--tokenizer", "bytes", "--val_tokens", 100, *split)
        assert [t for shard in read_shards(out) for t in shard] == [
            t for shard in bytes_reference(texts, 10**6, 1) for t in shard
        ]
    out = ["--out", tmp_path / "out", *SIZES]
    assert "has no split 'dev'; --split takes one of train, test" in error_of(
        "--source", tmp_path / "splits", "--split=dev", *out
    )
    (tmp_path / "one/state.json").write_text("{")
    assert "is no whole folder of save_to_disk" in error_of("--source", tmp_path / "one", *out)


STREAM = io.BytesIO()
with pa.ipc.new_stream(STREAM, pa.schema([("text", pa.string())])) as writer:
    for rows in (["one"] * 50, ["two"] * 50):
        writer.write_batch(pa.record_batch({"text": rows}))
STREAM = STREAM.getvalue()
TWICE = pa.ipc.new_file(sink := pa.BufferOutputStream(), schema := pa.schema([("text", pa.string())] * 2))
TWICE.close()
ROW = b'{"text": "x"}\n'
BAD = {
    "a.csv": (b"x\ny\n", ": has no column 'text'; its columns are x; --column NAME takes another"),
    "b.csv": (b"text\n\xff\xfe\n", ": cannot be read to its end ('utf-8' codec can't decode byte 0xff"),
    "c.csv": (b"id,text\n1,hello, world\n2,b\n", ", line 2: has 3 fields, its header has 2"),
    "d.csv": (b"text,id\na,1,\nb,2,\n", ", line 2: has 3 fields, its header has 2"),
    "e.csv": (b'id,text\n1,"a\nb"\n31\n', ", line 4: has 1 fields, its header has 2"),
    "f.csv": (b"text,text\nA0,B0\n", ": has 2 columns 'text'"),
    "g.csv": (b'id,text\n1,"never closed\n', ", line 2: not to be read as csv (unexpected end of data)"),
    "h.csv": (b"", ": has no column 'text'"),
    "a.tsv": (b'id\ttext\n1\t"hello\n2\tworld', ", line 3: not to be read as csv"),
    "a.json": (b'[{"text": "x"}', ": not JSON"),
    "b.json": (b'[{"text": "x"}, {"text": 1}]', ", row 2: 'text' is int, expected a string or null"),
    "c.json": (
        b'[{"text": "x"}, {"txt": "lost"}]',
        ", row 2: expected an object with a key 'text'; --column NAME takes another",
    ),
    "d.json": (b'["x"]', ", row 1: expected an object with a key 'text'"),
    "f.json": (b'{"text":\n"x"}', ", line 1: not JSON"),
    "a.arrow": (b"ARROW1", ": cannot be read to its end"),
    "b.arrow": (STREAM[:-8], ": does not end where its data ends; it was cut"),
    "c.arrow": (STREAM[: STREAM.index(b"two") - 200], ": "),
    "d.arrow": (STREAM * 2, ": does not end where its data ends; it was cut, or more was added"),
    "e.arrow": (STREAM.replace(b"oneone", b"\xff\xffeone", 1), ": cannot be read to its end"),
    "f.arrow": (sink.getvalue().to_pybytes(), ": has 2 columns 'text'"),
    "a.json.gz": (b"no gzip", ": cannot be read to its end"),
    "b.jsonl.gz": (gzip.compress(ROW * 9000)[:-30], ": cannot be read to its end"),
    "b.jsonl.bz2": (bz2.compress(ROW * 9000)[:-10], ": cannot be read to its end"),
    "b.jsonl.xz": (lzma.compress(ROW * 9000)[:-30], ": cannot be read to its end"),
    "b.jsonl.zst": (pa.compress(ROW * 9000, "zstd", asbytes=True)[:-4], ": cannot be read to its end"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path, name, capfd):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    message = error_of("--source", tmp_path / name, "--out", tmp_path / "new" / "out", *SIZES)
    assert message.startswith(f"{tmp_path / name}{expected}"), message
    assert not (tmp_path / "new").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_texts_that_look_like_something_else_stay_what_they_are(tmp_path):
    """Other readers guess types by the block, and write a date anew."""
    odd = ["2020-01-01T01:02:03Z", "1e22", "true", "5", "x\ud800y"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "words"}] * 9 + [{"text": text, "other": 1} for text in odd]))
    write_jsonl(tmp_path / "b.json", ["0123456789" * 1000] * 1200 + odd)
    for name in ("a.json", "b.json"):
        assert [piece.text for piece in read_pieces(tmp_path / name)][-5:] == odd
    pq.write_table(pa.table({"a": [{"b": "inner"}] * 3, "a.b": ["flat"] * 3}), tmp_path / "c.parquet")
    assert [piece.text for piece in read_pieces(tmp_path / "c.parquet", "a.b")] == ["flat"] * 3


# ---- datasets on the hub

CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: "data/small-*.parquet"}, {split: test, path: data/test.parquet}]
- config_name: arrays
  data_files: arrays/*.json
---
words
"""
SMALL = [[f"small {i} {j} " * 20 for j in range(20)] for i in range(9)]
EVERY = [text for texts in SMALL for text in texts]


@pytest.fixture
def hub(tmp_path):
    files = {f"data/small-{i}.parquet": write_parquet(tmp_path / "u", SMALL[i]).read_bytes() for i in range(9)}
    files |= {"data/test.parquet": write_parquet(tmp_path / "u", ["of the test " * 90] * 9).read_bytes()}
    files |= {"arrays/a.json": json.dumps(ROWS).encode(), "README.md": CARD.encode()}
    with serving_files(files, tmp_path / "data", "who/words") as server:
        yield server


@pytest.fixture
def by_name(hub, tmp_path):
    """The command with --source who/words: exit code, stdout, stderr."""

    def go(*words, out="data", **env):
        env = {**hub.env, "HF_HOME": str(tmp_path / "home"), **env}
        return run("--source", "who/words", *words, "--out", tmp_path / out, *SIZES, env=env, cwd=tmp_path)

    return go


def test_a_name_a_config_and_a_split_are_its_files(hub, by_name, tmp_path):
    for words, texts in {
        ("--config", "small"): EVERY,
        ("--config", "small", "--split", "test"): ["of the test " * 90] * 9,
        ("--config", "arrays"): TEXTS,
    }.items():
        rc, _, err = by_name(*words, out=words[-1])
        assert rc == 0, err
        assert read_shards(tmp_path / words[-1]) == bytes_reference(texts, 500, 600)
        manifest = json.loads((tmp_path / words[-1] / "manifest.json").read_text())
        assert (manifest["source"], manifest["revision"]) == (["who/words"], COMMIT)
        assert not list((tmp_path / "home").rglob("*.parquet"))
    hub.shutdown()  # a finished folder asks nobody
    assert "finished already" in by_name("--config", "small", out="small")[1]
    rc, _, err = by_name("--config", "arrays", out="small")
    assert rc == 2 and "config was small and is now arrays" in err


def test_what_a_name_leaves_open_is_asked_for(by_name, tmp_path):
    for words, expected in {
        (): "Please pick one among the available configs: ['small', 'arrays']; --config takes one",
        ("--config", "big"): "'big' not found. Available: ['small', 'arrays']; --config takes one",
        ("--config", "small", "--split", "dev"): "who/words: has no split 'dev'; --split takes one of train, test",
        ("--config", "small", "--column", "body"): "no column 'body'; its columns are id, text",
    }.items():
        rc, _, err = by_name(*words)
        assert (rc, expected in err.splitlines()[-1]) == (2, True), err
        assert not (tmp_path / "data").exists()


def test_an_interrupted_start_by_name_keeps_its_files(hub, by_name, tmp_path):
    hub.always["small-8.parquet"] = Fault(status=403)
    rc, _, err = by_name("--config", "small", "--workers", "1")
    assert rc == 2 and "403" in err
    assert (tmp_path / "data/.progress.json").exists()
    hub.always.clear()
    hub.head = COMMIT[::-1]  # the dataset was changed meanwhile
    rc, _, err = by_name("--config", "small")
    assert rc == 0, err
    assert read_shards(tmp_path / "data") == bytes_reference(EVERY, 500, 600)


def test_a_dataset_with_a_script_is_taken_as_the_hub_converted_it(hub, by_name, tmp_path):
    hub.files = {"README.md": b"words", "words.py": b"raise SystemExit('never run')"}
    parquet = [write_parquet(tmp_path / "u", texts).read_bytes() for texts in SMALL]
    hub.converted = {
        "small/train/0000.parquet": parquet[0],
        "small/train/0001.parquet": parquet[1],
        "small/test/0000.parquet": parquet[8],
        "big/partial-train/0000.parquet": parquet[8],
    }
    rc, _, err = by_name("--config", "small")
    assert rc == 0, err
    assert read_shards(tmp_path / "data") == bytes_reference(SMALL[0] + SMALL[1], 500, 600)
    assert json.loads((tmp_path / "data/manifest.json").read_text())["revision"] == CONVERTED
    address = "hf://datasets/who/words@refs/convert/parquet/big/partial-train"
    assert f"only the beginning of it; --source {address} takes that" in by_name("--config", "big", out="b")[2]
    assert "one of big partial-train, small test, small train" in by_name(out="b")[2]
    env = {**hub.env, "HF_HOME": str(tmp_path / "home")}
    words = ("--source", f"who/words@{COMMIT}", "--config", "small", "--out", tmp_path / "b", *SIZES)
    assert "has converted its newest revision only; leave out @" in run(*words, env=env)[2]
    rc, _, err = run("--source", address, "--out", tmp_path / "part", *SIZES, env=env)
    assert rc == 0, err
    assert read_shards(tmp_path / "part") == bytes_reference(SMALL[8], 500, 600)


def test_a_folder_of_the_same_name_goes_before_the_hub(tmp_path):
    (tmp_path / "who/words").mkdir(parents=True)
    write_jsonl(tmp_path / "who/words/a.jsonl", TEXTS)
    rc, _, err = run("--source", "who/words", "--out", "out", *SIZES, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert rc == 0, err
    assert read_shards(tmp_path / "out") == bytes_reference(TEXTS, 500, 600)


def test_files_on_the_hub_that_are_no_text_are_refused(hub, by_name):
    hub.files = {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: a.tar\n---\n", "a.tar": b"x" * 9}
    assert "a.tar: its name does not end in .parquet, .arrow" in by_name()[2]
    hub.files = {"README.md": b"words"}
    rc, _, err = by_name()
    assert rc == 2 and err.count("\n") == 1
    assert err.startswith("error: who/words: no file or folder here has this name, and as a dataset on the hub: ")


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("sep: ';'", "a.csv", "sep = ';'"),
        ("column_names: [id, text]", "a.csv", "names = ['id', 'text']"),
        ("filters: [[id, <, 2]]", "a.parquet", "filters = "),
    ],
)
def test_a_card_with_options_of_a_reader_is_refused(hub, by_name, tmp_path, option, name, expected):
    content = b"id;text\n1;words\n" if name == "a.csv" else hub.files["data/test.parquet"]
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n  {option}\n---\n"
    hub.files = {"README.md": card.encode(), name: content}
    rc, _, err = by_name()
    assert (rc, err.count("\n")) == (2, 1) and "its files are to be read with " in err and expected in err
    assert not (tmp_path / "data").exists()


def test_a_revision_is_all_after_the_sign(hub, by_name, tmp_path):
    env = {**hub.env, "HF_HOME": str(tmp_path / "home")}
    for revision in ("main/data", "nowhere"):
        rc, _, err = run("--source", f"who/words@{revision}", "--config=small", "--out", tmp_path / "data", *SIZES, env=env)
        assert rc == 2 and not (tmp_path / "data").exists(), err
    (tmp_path / "who/words").mkdir(parents=True)  # which the name with a revision is not
    words = ("--source", f"who/words@{COMMIT}", "--config", "small", "--out", "data", *SIZES)
    rc, _, err = run(*words, cwd=tmp_path, env=env)
    assert rc == 0, err
    assert read_shards(tmp_path / "data") == bytes_reference(EVERY, 500, 600)


def test_what_the_cache_has_of_another_commit_is_taken_by_its_sha256_only(hub, by_name, tmp_path):
    env = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home")}
    fetch = "from huggingface_hub import hf_hub_download as get; [get('who/words', n, repo_type='dataset') for n in {}]"
    names = ["arrays/a.json", "data/small-0.parquet"]
    subprocess.run([sys.executable, "-c", fetch.format(names)], env=env, check=True, capture_output=True)
    (snapshot,) = (tmp_path / "home").rglob("snapshots/*")
    snapshot.rename(snapshot.with_name("0" * 40))
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    hub.files["arrays/a.json"] = hub.files["arrays/a.json"].replace(b"one", b"two")  # of the same size
    hub.downloads.clear()
    rc, _, err = by_name("--config", "arrays")
    assert rc == 0, err
    assert read_shards(tmp_path / "data") == bytes_reference([text and text.replace("one", "two") for text in TEXTS], 500, 600)
    rc, _, err = by_name("--config", "small", out="small")
    assert rc == 0, err
    assert "data/small-0.parquet" not in hub.downloads and "data/small-1.parquet" in hub.downloads


def test_a_wrong_bit_in_a_small_file_is_noticed(hub, by_name, tmp_path):
    hub.faults["arrays/a.json"] = [Fault(corrupt=True)]
    rc, _, err = by_name("--config", "arrays")
    assert rc == 0, err
    assert "the bytes that came do not have the hub's sha1; attempt 2" in err
    assert read_shards(tmp_path / "data") == bytes_reference(TEXTS, 500, 600)


def test_an_error_in_a_fetched_file_names_it_as_the_hub_does(hub, by_name):
    hub.files["arrays/a.json"] = b'[{"txt": "lost"}]'
    assert by_name("--config", "arrays")[2].splitlines()[-1].startswith("error: arrays/a.json, row 1: expected an object")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--source", "demo", "--config", "x"], "--config x: goes with --source OWNER/NAME"),
        (["--source", "demo", "--split", "x"], "--source demo: has neither splits nor columns"),
        (["--source", "a.txt", "--column", "x"], "--column x: has no meaning for a.txt"),
        (["--source", "a.txt", "--config", "x"], "--config x: goes with --source OWNER/NAME"),
        (["--source", "hf://datasets/a/b/c", "--split", "x"], "--split x: goes with --source OWNER/NAME"),
        (["--source", "a.txt", "--split", "x"], "--split x: has no meaning for a.txt"),
        (["--pretokenized", "a/b", "--split", "x"], "--split does not go with --pretokenized"),
        (["--pretokenized", "a/b", "--column", "x"], "--column does not go with --pretokenized"),
    ],
)
def test_flags_without_a_meaning_are_refused(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("words " * 1000)
    assert expected in error_of(*words, "--out", "out")
    assert sorted(os.listdir()) == ["a.txt"]


def test_offline_a_name_says_what_is_lacking(by_name, tmp_path):
    rc, _, err = by_name("--config", "small", HF_HUB_OFFLINE="1")
    assert (rc, err.count("\n")) == (2, 1), err
    assert "offline" in err.lower() and not contents(tmp_path / "data")
