"""Documents: each target in its own, each evaluated by itself where asked, and the file that keeps their losses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st

from core.checkpoint import load_model
from core.data import TokenStream
from core.distributed import Distributed
from core.documents import Losses, LossSums, find_documents, load, merge
from core.errors import UserError
from core.evaluate import evaluate
from core.files import sha256_file, write_json
from core.profile import Profile
from eval_ppl import evaluate_run
from text.shard_writer import write_shard
from text.shards import MANIFEST
from text.tokenizer import load_tokenizer

CPU = Distributed(torch.device("cpu"), torch.float32)
EOT = 256
SIZES = (20, 1, 64, 31, 32, 33, 1, 70, 90, 45)  # targets of the documents below; the first lacks its end-of-text


class Stream:
    """Stands in for a TokenStream: some tokens in memory."""

    folder = Path("here")

    def __init__(self, tokens, tokenizer="bytes", eot=EOT):
        self.tokens, self.tokenizer, self.manifest = np.array(tokens, dtype=np.uint16), tokenizer, {"eot": eot}

    def __len__(self):
        return len(self.tokens)

    def read(self, start, count):
        assert start + count <= len(self.tokens)
        return self.tokens[start : start + count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder of documents shorter and longer than windows, in two validation shards."""
    out, draw = tmp_path_factory.mktemp("documents"), np.random.default_rng(1)
    tokens = draw.integers(97, 123, sum(SIZES) + 1, dtype=np.uint16)
    tokens[np.cumsum(SIZES)[:-1]] = EOT
    shards = []
    for i, part in enumerate((tokens[:150], tokens[150:])):
        name = f"x_val_{i:06d}.bin"
        shards.append({"file": name, "split": "val", "tokens": len(part), "sha256": write_shard(out / name, part)})
    write_json(out / MANIFEST, {"tokenizer": "bytes", "n_vocab": 257, "shards": shards})
    return out


def by_hand(tokens) -> list[tuple[int, int]]:
    """First token and last target of each document that has a target."""
    opens = [i for i, token in enumerate(tokens) if token == EOT or i == 0]
    return [(a, b) for a, b in zip(opens, [*opens[1:], len(tokens) - 1], strict=True) if b > a]


def losses_by_hand(model, tokens, begin: int, end: int, length: int, stride: int) -> dict[int, float]:
    """The loss of each of the targets begin + 1 … end from windows that see nothing else."""
    found: dict[int, float] = {}
    for start in range(begin, end, stride):
        piece = torch.from_numpy(tokens[start : min(start + length, end) + 1].astype(np.int64))
        with torch.no_grad():
            logp = model(piece[None, :-1])[0].double().log_softmax(-1)
        for at, target in enumerate(range(start + 1, start + len(piece))):
            found.setdefault(target, -logp[at, piece[at + 1]].item())
    return found


def test_the_corpus_is_what_the_tests_take_it_for(folder):
    stream = TokenStream(folder, "val", 320)
    documents = by_hand(stream.read(0, len(stream)))
    assert [b - a for a, b in documents] == list(SIZES) and stream.read(0, 1) != EOT


@given(
    tokens=st.lists(st.sampled_from([97, 98, 200, EOT]), min_size=2, max_size=60),
    max_tokens=st.integers(0, 70), min_tokens=st.integers(1, 8), block=st.integers(1, 70),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_documents_are_found_as_they_are_defined(tokens, max_tokens, min_tokens, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.documents.BLOCK", block)
        cut = tokens[: max_tokens + 1] if max_tokens else tokens
        found = find_documents(Stream(tokens), max_tokens)
        assert list(zip(found.first_D, found.first_D + found.tokens_D, strict=True)) == by_hand(cut)
        assert found.tokens_D.sum() == len(cut) - 1 and found.parts is None
        assert found.bytes_D.tolist() == [sum(token != EOT for token in cut[a + 1 : b + 1]) for a, b in by_hand(cut)]

        fit = [(a, b) for a, b in by_hand(tokens) if b - a >= min_tokens]
        if not fit:
            with pytest.raises(UserError, match=f"--documents = {min_tokens}: the longest of the .* documents in here has"):
                find_documents(Stream(tokens), max_tokens, min_tokens)
            return
        while max_tokens and len(fit) > 1 and sum(b - a for a, b in fit) > max_tokens:
            fit.pop()
        found = find_documents(Stream(tokens), max_tokens, min_tokens)
        assert list(zip(found.first_D, found.first_D + found.tokens_D, strict=True)) == fit
        assert found.bytes_D.tolist() == [sum(token != EOT for token in tokens[a + 1 : b + 1]) for a, b in fit]


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (32, 32), (33, 7), (64, 20), (200, 200), (1, 1)])
@pytest.mark.parametrize("max_tokens", [0, 230])
@pytest.mark.parametrize("min_tokens", [None, 1, 32])
def test_the_losses_of_documents_equal_the_definition(runs, folder, length, stride, max_tokens, min_tokens):
    model, _, _ = load_model(runs / "carope")
    stream = TokenStream(folder, "val", 320)
    tokens = stream.read(0, len(stream))
    documents = find_documents(stream, max_tokens, min_tokens)
    sums, profile = LossSums(documents, CPU.device), Profile(length, CPU.device)
    found = evaluate(model, stream, length, 3, CPU, max_tokens, stride=stride, by_document=sums, profile=profile)
    if min_tokens is None:
        end = max_tokens or len(tokens) - 1
        nll = losses_by_hand(model, tokens, 0, end, length, stride)
        wanted = [[nll[target] for target in range(a + 1, b + 1)] for a, b in by_hand(tokens[: end + 1])]
    else:
        pairs = [(a, b) for a, b in by_hand(tokens) if b - a >= min_tokens]
        while max_tokens and sum(b - a for a, b in pairs) > max_tokens:
            pairs.pop()
        wanted = [list(losses_by_hand(model, tokens, a, b, length, stride).values()) for a, b in pairs]
    sizes = [len(one) for one in wanted]
    assert documents.tokens_D.tolist() == sizes and found.tokens == sum(sizes)
    np.testing.assert_allclose(sums.sums_D, [sum(one) for one in wanted], rtol=1e-6)
    assert sums.sums_D.sum().item() == pytest.approx(found.nll * found.tokens, rel=1e-12)
    plain = evaluate(model, stream, length, 5, CPU, max_tokens, stride=stride)
    if min_tokens is None:  # the numbers are those without documents, but for the batches
        assert (found.nll, found.nll_stderr) == pytest.approx((plain.nll, plain.nll_stderr), rel=1e-6)
    else:
        residual = [sum(one) - found.nll * len(one) for one in wanted]
        error = math.sqrt(len(wanted) / (len(wanted) - 1) * np.square(residual).sum()) / found.tokens
        assert found.nll_stderr == pytest.approx(error, rel=1e-5)
        starts = [min(length, b - s) for a, b in pairs for s in range(a, b, stride) if s == a or b - s > length - stride]
        for record in profile.summary():
            assert record["windows"] == sum(reach >= record["to"] for reach in starts)
        assert sum(record["windows"] > 0 for record in profile.summary()) == len(profile.summary())


def test_by_position_only_what_documents_reach_goes_in(runs, folder):
    model, _, _ = load_model(runs / "carope")
    stream = TokenStream(folder, "val", 320)
    tokens = stream.read(0, len(stream))
    sums, profile = LossSums(find_documents(stream, 0, 1), CPU.device), Profile(64, CPU.device)
    evaluate(model, stream, 64, 4, CPU, by_document=sums, profile=profile)
    windows = [list(losses_by_hand(model, tokens, s, min(s + 64, b), 64, 64).values())
               for a, b in by_hand(tokens) for s in range(a, b, 64)]  # fmt: skip
    for record in profile.summary():
        means = [np.mean(w[record["from"] - 1 : record["to"]]) for w in windows if len(w) >= record["to"]]
        assert record["windows"] == len(means) and record["loss"] == pytest.approx(np.mean(means), rel=1e-5)


class Recorder(torch.nn.Module):
    """Stands in for a model: its losses are the targets, and it remembers the shapes that it was asked for."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x_BT, y_BT, reduction):
        assert torch.equal(x_BT[:, 1:], y_BT[:, :-1])
        self.shapes.append(tuple(x_BT.shape))
        return y_BT.double()


def test_batches_keep_their_shape_up_to_the_end_of_the_stream(folder):
    net, stream = Recorder(), TokenStream(folder, "val", 320)
    sums = LossSums(find_documents(stream, 0, 30), CPU.device)
    evaluate(net, stream, 50, 4, CPU, by_document=sums)
    assert net.shapes == [(4, 50), (4, 50), (1, 50), (1, 45)]  # of 64, 31, 32, 33, 70, 90 and the last 45 targets
    assert sums.sums_D.tolist() == [stream.read(a + 1, b - a).sum() for a, b in by_hand(stream.read(0, len(stream)))
                                    if b - a >= 30]  # fmt: skip


def test_the_command_and_its_file_whatever_the_ranks(runs, folder, tmp_path):
    words = ["eval_ppl.py", runs / "carope", runs / "learned", "--data", folder, "--device", "cpu", "--lengths", 64, 16, 32]
    words += ["--documents", 20, "--batch", 3]
    for name, command in (("a", run_command), ("b", lambda *words: torchrun(2, *words))):
        done = command(*words, "--losses", tmp_path / f"{name}.npz", "--json", tmp_path / f"{name}.json")
        assert done.returncode == 0, done.stderr
        assert "standard error over documents of at least 20 tokens, 385 tokens, bits per byte = " in done.stdout
    one, two = load(tmp_path / "a.npz"), load(tmp_path / "b.npz")
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-12)
    assert one.about == two.about and one.runs.tolist() == two.runs.tolist() == ["carope", "learned"]
    for name in ("lengths", "first", "tokens", "bytes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))

    assert one.lengths.tolist() == [16, 32, 64] and one.tokens.tolist() == [20, 64, 31, 32, 33, 70, 90, 45]
    assert np.isnan(one.loss[1, 2]).all() and np.isnan(one.loss).sum() == 8  # learned has no positions beyond 32
    stream = TokenStream(folder, "val", 320)
    about = one.about
    assert about.sha256 == [record.sha256 for record in stream.records()] == [sha256_file(path) for path in stream.paths]
    assert (about.tokenizer, about.min_document_tokens, about.stride, about.max_tokens) == ("bytes", 20, None, 0)
    assert (about.step, about.dtype) == ([30, 30], ["float32", "float32"])
    results = json.loads((tmp_path / "a.json").read_text())
    assert [r["length"] for r in results] == [64, 16, 32] * 2
    for r in results:
        assert r["losses"] == {"file": str(tmp_path / "a.npz"), "sha256": sha256_file(tmp_path / "a.npz")}
        assert r["min_document_tokens"] == 20
        if r["tokens"] is None:
            assert r["documents"] is r["bytes"] is r["bits_per_byte"] is None
            continue
        nats = one.loss[int(r["run"] == "learned"), one.lengths.tolist().index(r["length"])].sum()
        assert nats == pytest.approx(r["nll"] * r["tokens"], rel=1e-12)
        assert (r["tokens"], r["documents"], r["bytes"]) == (385, 8, one.bytes.sum())
        assert r["bits_per_byte"] == pytest.approx(nats / math.log(2) / r["bytes"], rel=1e-12)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_bytes_of_documents_are_those_of_their_text(name):
    tokenizer = load_tokenizer(name)
    texts = ["A plain text.", "ø 東京 🙂\n\n", "", " <|endoftext|> in words", "the end"]
    tokens = tokenizer.encode_documents(texts)
    found = find_documents(Stream(tokens, name, tokenizer.eot))
    assert found.bytes_D.tolist() == [len(text.encode()) for text in texts]
    cut = find_documents(Stream(tokens, name, tokenizer.eot), 20)
    assert cut.n_bytes == sum(len(tokenizer.decode_bytes([i])) for i in tokens[1:21].tolist() if i != tokenizer.eot)


def test_bits_per_byte_of_a_run_and_none_of_text_that_is_not_known(runs, folder, monkeypatch):
    stream = TokenStream(folder, "val", 320)
    text = load_tokenizer("bytes").decode_bytes([i for i in stream.read(1, 300).tolist() if i != EOT])
    (result,) = evaluate_run(runs / "carope", [32], CPU, data=str(folder), max_tokens=300)
    assert result["bytes"] == len(text) and result["documents"] == len(by_hand(stream.read(0, 301)))
    assert result["bits_per_byte"] == pytest.approx(result["nll"] * 300 / math.log(2) / len(text))
    assert result["min_document_tokens"] is None and "losses" not in result
    monkeypatch.setattr("core.documents.byte_lengths", lambda _: None)  # as without tiktoken's file
    keep: list[Losses] = []
    (unknown,) = evaluate_run(runs / "carope", [32], CPU, data=str(folder), max_tokens=300, keep=keep)
    assert unknown == result | {"bytes": None, "bits_per_byte": None} and set(keep[0].bytes) == {-1}
    assert find_documents(Stream([EOT, 97, 300], eot=EOT)).bytes_D is None  # an id beyond the tokenizer's
    monkeypatch.setattr("core.documents.eot_of", lambda *_: None)  # as of a tokenizer that is not ours
    (unknown,) = evaluate_run(runs / "carope", [32], CPU, data=str(folder), max_tokens=300)
    assert unknown == result | {"bytes": None, "bits_per_byte": None, "documents": None}
    with pytest.raises(UserError, match="which token of 'bytes' ends a text is not known"):
        evaluate_run(runs / "carope", [32], CPU, data=str(folder), min_document_tokens=1)


@pytest.fixture(scope="module")
def losses(runs, folder) -> list[Losses]:
    """Of `carope` at 16 and 32 and `learned` at 64, in this order."""
    keep: list[Losses] = []
    evaluate_run(runs / "carope", [32, 16], CPU, data=str(folder), keep=keep)
    evaluate_run(runs / "learned", [64], CPU, data=str(folder), keep=keep)
    return keep


def assert_same(one: Losses, other: Losses) -> None:
    assert one.about == other.about
    for name in ("runs", "lengths", "loss", "first", "tokens", "bytes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_file_keeps_all_and_the_same_is_written_twice(losses, tmp_path):
    both = merge(losses)
    sums = {both.save(tmp_path / name) for name in ("a.npz", "b.npz")}
    assert sums == {sha256_file(tmp_path / "a.npz")} and sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert_same(load(tmp_path / "a.npz"), both)
    with np.load(tmp_path / "a.npz") as plain:  # as others read it
        assert set(plain) == {"runs", "lengths", "loss", "first", "tokens", "bytes", "about"}
        assert plain["loss"].dtype == np.float64 and json.loads(str(plain["about"]))["step"] == [30, 30]


def test_merging_unites_runs_and_lengths(runs, folder, losses):
    both = merge(losses)
    assert both.runs.tolist() == ["carope", "learned"] and both.lengths.tolist() == [16, 32, 64]
    np.testing.assert_array_equal(both.loss[0, :2], losses[0].loss[0])
    assert np.isnan(both.loss[0, 2]).all() and np.isnan(both.loss[1]).all()
    keep: list[Losses] = []
    evaluate_run(runs / "carope", [64], CPU, data=str(folder), keep=keep)
    longer = merge([*losses, *keep])
    assert longer.runs.tolist() == ["carope", "learned"] and longer.about == both.about
    np.testing.assert_array_equal(longer.loss[0, 2], keep[0].loss[0, 0])
    with pytest.raises(UserError, match="losses of carope at length 64 are there twice"):
        merge([longer, *keep])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_tokens": 300}, "first"), ({"max_tokens": 380}, "tokens"), ({"stride": 8}, "stride"),
        ({"min_document_tokens": 1}, "min_document_tokens"), ({"data": "corpus"}, "sha256"),
    ],
)  # fmt: skip
def test_losses_of_other_documents_are_not_merged(runs, folder, corpus, losses, options, name):
    data = corpus if "data" in options else folder
    with pytest.raises(UserError, match=rf"losses of carope and learned: not of the same documents \({name} differs\)"):
        evaluate_run(runs / "learned", [16], CPU, **(options | {"data": str(data)}), keep=[losses[0]])


def test_a_damaged_file_is_refused_in_one_line(losses, tmp_path):
    path, draw = tmp_path / "a.npz", np.random.default_rng(0)
    losses[0].save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no zip", whole[:100], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path}: not a readable file of losses"):
            load(path)
    refused = 0
    for at in draw.integers(0, len(whole), 200):  # what is not noticed, as a flag that nobody reads, changes nothing
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :])
        try:
            found = load(path)
        except UserError as error:
            refused += str(error).startswith(f"{path}: not a readable file of losses") and "\n" not in str(error)
        else:
            assert_same(found, losses[0])
    assert refused > 100
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("runs", lambda x: x.astype(object)), ("runs", lambda x: np.append(x, x)), ("lengths", lambda x: x[::-1]),
        ("lengths", lambda x: x - 16), ("loss", lambda x: x[:, :1]), ("loss", lambda x: x.astype(np.float32)),
        ("loss", lambda x: x / 0), ("first", lambda x: x[::-1]), ("first", lambda x: x - 1), ("tokens", lambda x: x + 1),
        ("tokens", lambda x: x[1:]), ("tokens", lambda x: 0 * x), ("bytes", lambda x: x - 2), ("about", lambda x: "{}"),
        ("about", lambda x: str(x).replace("[30]", "[30, 30]")), ("about", None), ("loss", None),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_file_that_cannot_be_is_refused(losses, tmp_path, name, change):
    path = tmp_path / "a.npz"
    losses[0].save(path)
    with np.load(path) as found:
        arrays = dict(found)
    if change:
        arrays[name] = change(arrays[name])
    else:
        del arrays[name]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=f"^{path}: not a readable file of losses") as refused:
        load(path)
    assert "\n" not in str(refused.value)
