"""Shards that others have tokenized, from the hub or a local folder, into a data folder of ours.

The files are llm.c's .bin or build-nanogpt's .npy. Nothing is decoded or encoded: each is checked (header, size, sha256, range
of ids) beside its place and moved there whole; manifest.json comes last. A manifest.json beside them is believed: it says whose
tokens they are, which of them are for validation, and their sha256; without one they are GPT-2's. nanoGPT's train.bin and
val.bin, ids without a header, are copied into shards of ours.
"""

import os
import platform
import re
import shutil
import threading
from collections.abc import Collection
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from core.console import quiet
from core.errors import UserError
from core.files import locked, sha256_file, write_json
from text.corpus import SourceFile
from text.hub import HUB, Dataset, HubFiles, difference
from text.listing import files_in_folder
from text.progress import check_space
from text.shard_writer import put_in_place, scratch_in, write_shard
from text.shards import HEADER_BYTES, MANIFEST, SHARD_SUFFIXES, ShardEntry, is_headerless, open_shard, read_manifest
from text.token_stream import Earlier, read_earlier, refuse_other_work
from text.tokenizer import GPT2, eot_of

FINEWEB_TOKENS = "kjj0/finewebedu10B-gpt2"  # sample-10BT of FineWeb-Edu, by llm.c's script
PROGRESS = ".pretokenized.json"  # not the name that text has: the one cannot go on from the other
NPY_HEADER_BYTES = 128  # as numpy writes them; only to tell the number of tokens before the file is there
LOOK_TOKENS = 1 << 24  # looked through at a time
PIECE_TOKENS = 100_000_000  # of a shard that is made of a file without a header


class Unfinished(Earlier):
    """The progress file."""

    shards: list[ShardEntry] = []  # noqa: RUF012


class Planned(NamedTuple):
    """File number `file` of a source, to become the shard `name`."""

    file: int
    name: str
    tokens: int  # by its size
    first: int | None = None  # of a file without a header: the token it begins with


class Vocabulary(NamedTuple):
    """Whose tokens they are."""

    tokenizer: str
    n_vocab: int
    eot: int | None

    @classmethod
    def of(cls, manifest: dict[str, Any] | None) -> "Vocabulary":
        """What a manifest says; GPT-2's without one."""
        if manifest is None:
            return cls(GPT2.name, GPT2.n_vocab, GPT2.eot)
        return cls(manifest["tokenizer"], manifest["n_vocab"], eot_of(manifest["tokenizer"], manifest))


class HubShards(HubFiles):
    """The shards in a dataset on the hub."""

    headerless = frozenset[int]()  # a file without a header is refused there

    def manifest(self) -> dict[str, Any] | None:
        """The manifest.json beside the shards, if there is one. Raises UserError for one that cannot be read."""
        for index, file in enumerate(self.files):
            if file.name.endswith(MANIFEST):
                with self.fetch(index) as path:
                    return read_manifest(path.parent)
        return None


class FolderShards:
    """The shards in a local folder; they stay there."""

    revision = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = [path for path in folder.iterdir() if path.suffix in SHARD_SUFFIXES and path.name[0] != "." and path.is_file()]
        self.files = [SourceFile(path.name, path.stat().st_size, 0) for path in found]
        if not found:
            raise UserError(f"--pretokenized {folder}: no {' or '.join(SHARD_SUFFIXES)} files there")
        self.headerless = {i for i, path in enumerate(found) if is_headerless(path)}
        if (folder / "meta.pkl").exists():
            raise UserError(
                f"--pretokenized {folder}: by its meta.pkl the ids are of a vocabulary of their own, as nanoGPT's characters "
                "are; a pickle is not opened, so prepare the text itself, with --source"
            )

    def manifest(self) -> dict[str, Any] | None:
        """The folder's manifest.json, if there is one. Raises UserError for one that cannot be read."""
        return read_manifest(self.folder)

    def cached(self, file: SourceFile) -> Path:
        """The file as it lies."""
        return self.folder / file.name

    def download(self, index: int) -> Path:
        """Nothing can be brought into a folder. Raises UserError."""
        raise UserError(f"{self.folder / self.files[index].name}: was changed while it was read")

    def stop(self) -> None:
        """Nothing is to be stopped."""


def adopt(where: str, out: Path, limit_tokens: int | None, workers: int) -> None:
    """Make `out` a data folder of the shards at `where`, or bring what is missing or damaged of them. Raises UserError.

    `limit_tokens` is kept by whole shards, the fewest that have as many; `workers` files come at a time.
    """
    terms: dict[str, Any] = {"pretokenized": where, "limit_tokens": limit_tokens}
    try:
        with locked(out), scratch_in(out) as scratch:
            earlier, finished = read_earlier(out, PROGRESS, Unfinished)
            refuse_other_work(out, earlier, terms)
            good = good_shards(out, earlier.get("shards", []), workers)
            if not finished or len(good) < len(earlier["shards"]):
                source = open_source(where, scratch, earlier.get("revision"))
                manifest = source.manifest()
                planned = plan(where, source.files, limit_tokens, manifest, source.headerless)
                book = Book(out, terms, good, manifest)
                files = [[source.files[p.file].name, source.files[p.file].size] for p in planned]
                refuse_other_work(out, earlier, {"files": files, "tokenizer": book.whose.tokenizer})
                finished = False
                book.terms |= {"tokenizer": book.whose.tokenizer, "revision": source.revision, "files": files}
                good = bring_all(source, planned, book, scratch, workers)
            tokens, documents = (sum(shard[key] for shard in good) for key in ("tokens", "documents"))
            state = "finished already, every sha256 is right" if finished else "finished"
            print(f"{out}: {state}, {tokens:,} tokens of {documents:,} documents in {len(good)} shards")
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None


def open_source(where: str, scratch: Path, revision: str | None) -> HubShards | FolderShards:
    """The files that `where` names, a folder before a dataset of the same name. Raises UserError where there are none."""
    folder = Path(where)
    if folder.is_dir():
        return FolderShards(folder)
    if where[0] in "./~" or not HUB.fullmatch(where):
        raise UserError(f"--pretokenized {where}: no folder here, nor OWNER/NAME[@REVISION][/FOLDER] of a dataset on the hub")
    dataset = Dataset.at(where, "--pretokenized", revision)
    commit, files = files_in_folder(dataset, lambda name: name.endswith(SHARD_SUFFIXES) or name == MANIFEST)
    if all(file.name.endswith(MANIFEST) for file in files):
        raise UserError(f"--pretokenized {where}: no {' or '.join(SHARD_SUFFIXES)} files there")
    return HubShards(dataset, commit, files, scratch)


def plan(
    where: str,
    files: list[SourceFile],
    limit_tokens: int | None,
    manifest: dict[str, Any] | None = None,
    headerless: Collection[int] = (),
) -> list[Planned]:
    """The shards to have, validation first, named and numbered as ours: val_000000, train_000001, …

    Validation is what `manifest` says; without one what says "val" in its name, else the first file. The `headerless` of the
    files become shards of at most PIECE_TOKENS. Raises UserError where nothing would be left to train on, or where the manifest
    lists other files.
    """
    shards = [i for i, file in enumerate(files) if file.name.endswith(SHARD_SUFFIXES)]
    if len(folders := sorted({files[i].name.rpartition("/")[0] for i in shards})) > 1:
        raise UserError(f"--pretokenized {where}: shards lie in several folders, name one: {', '.join(folders[:5])}")

    def key(index: int) -> list[Any]:  # numbers in a name count as numbers
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", files[index].name)]

    val, train = splits(where, {i: files[i].name.rpartition("/")[2] for i in sorted(shards, key=key)}, manifest)
    pieces = [(i, *piece) for i in val + train for piece in cut(files[i], i in headerless)]
    planned, tokens = list[Planned](), 0
    for number, (index, first, n) in enumerate(pieces):
        split_name = "val" if index in val else "train"
        if limit_tokens and tokens >= limit_tokens and planned[-1].name.startswith("train"):
            break
        planned.append(Planned(index, f"{split_name}_{number:06d}{Path(files[index].name).suffix}", n, first))
        tokens += n
    return planned


def splits(where: str, names: dict[int, str], manifest: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """Which of the shards, given their names in order, are for validation and which for training. Raises UserError."""
    if manifest is None:
        val = [i for i, name in names.items() if "val" in name.lower()] or [*names][:1]
    else:
        listed = {shard["file"]: shard["split"] for shard in manifest["shards"]}
        if strange := sorted(set(names.values()) ^ set(listed)):
            raise UserError(f"--pretokenized {where}: {strange[0]} is either not there or not in its {MANIFEST}")
        val = [i for i, name in names.items() if listed[name] == "val"]
    train = [i for i in names if i not in val]
    if not (val and train):
        only, lacking = ("validation", "train on") if val else ("training", "validate on")
        raise UserError(
            f"--pretokenized {where}: {next(iter(names.values()))} is for {only}, and there is no shard to {lacking}"
        )
    return val, train


def cut(file: SourceFile, is_headerless: bool) -> list[tuple[int | None, int]]:
    """(first token, tokens) of the shards that a file becomes: one, or as many as it takes where it has no header."""
    if not is_headerless:
        return [(None, n_tokens(file))]
    total = file.size // 2
    return [(first, min(PIECE_TOKENS, total - first)) for first in range(0, total, PIECE_TOKENS)]


def n_tokens(file: SourceFile) -> int:
    """The tokens in a file of this size."""
    return max(0, file.size - (NPY_HEADER_BYTES if file.name.endswith(".npy") else HEADER_BYTES)) // 2


class Book:
    """The shards that `out` has, kept in the progress file and at the end in the manifest."""

    def __init__(self, out: Path, terms: dict[str, Any], shards: list[dict[str, Any]], manifest: dict[str, Any] | None) -> None:
        """`shards` are there already; `manifest` is that of the source."""
        self.out, self.terms, self.whose = out, terms, Vocabulary.of(manifest)
        self.listed = {shard["file"]: shard for shard in manifest["shards"]} if manifest else {}
        self.shards = {shard["file"]: shard for shard in shards}
        self._lock, self._closed = threading.Lock(), False

    def write(self) -> None:
        """The progress file, for a later start."""
        write_json(self.out / PROGRESS, self.terms | {"shards": list(self.shards.values())})

    def add(self, shard: dict[str, Any], path: Path) -> None:
        """Put a checked file in its place. It is noted before: killed between the two, a start finds it where it came in."""
        with self._lock:
            if self._closed:
                return
            self.shards[shard["file"]] = shard
            self.write()
            put_in_place(path, self.out / shard["file"])

    def finish(self, names: list[str]) -> list[dict[str, Any]]:
        """Write the manifest; returns its shards, in the order of `names`."""
        shards = [self.shards[name] for name in names]
        totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
        versions = {"python": platform.python_version(), "numpy": np.__version__, "huggingface_hub": version("huggingface_hub")}
        about = {"n_vocab": self.whose.n_vocab, "eot": self.whose.eot} | totals | {"shards": shards, "versions": versions}
        write_json(self.out / MANIFEST, self.terms | about)
        (self.out / PROGRESS).unlink()
        return shards

    def close(self) -> None:
        """Take no more shards; where there is none, no file stays."""
        with self._lock:
            self._closed = True
        if not self.shards:
            (self.out / PROGRESS).unlink(missing_ok=True)


def bring_all(
    source: HubShards | FolderShards, planned: list[Planned], book: Book, scratch: Path, workers: int
) -> list[dict[str, Any]]:
    """Bring every planned shard that `book` has not, then write the manifest; returns all of them."""
    todo = [p for p in planned if p.name not in book.shards]
    linked = [linkable(source.cached(source.files[p.file]), book.out) for p in todo]
    need = sum(source.files[p.file].size for p, no_space in zip(todo, linked, strict=True) if not no_space)
    tokens = sum(p.tokens for p in planned)
    check_space(book.out, f"{tokens:,} tokens in {len(planned)} shards, {len(planned) - len(todo)} are there", need)
    try:
        book.write()
        (book.out / MANIFEST).unlink(missing_ok=True)  # a shard is damaged: until it is whole again the folder is unfinished
        for first in todo[:1]:
            bring(source, first, book, scratch)  # alone: what is no shard is found out before everything is downloaded
        with ThreadPool(workers) as pool:  # whose threads an error or a signal does not wait for
            for _ in pool.imap_unordered(lambda p: bring(source, p, book, scratch), todo[1:]):
                pass
        return book.finish([p.name for p in planned])
    finally:
        source.stop()
        book.close()


def linkable(path: Path | None, out: Path) -> bool:
    """Whether `path` lies on the same file system as `out`, where a second name takes no space."""
    return path is not None and path.stat().st_dev == out.stat().st_dev


def bring(source: HubShards | FolderShards, planned: Planned, book: Book, scratch: Path) -> None:
    """Have one shard in its place: linked or copied from the cache or the folder where it is whole there, else downloaded."""
    file = source.files[planned.file]
    there = source.cached(file)
    if there is not None and not difference(there, file):
        scratch.mkdir(exist_ok=True)
        path = scratch / planned.name
        if planned.first is None:
            link_or_copy(there.resolve(), path)
        else:
            write_shard(path, np.memmap(there, "<u2", "r", offset=2 * planned.first, shape=(planned.tokens,)))
    else:
        path = source.download(planned.file)
    try:
        shard = inspect(path, file.name, planned.name, book.whose)
        shard["sha256"] = file.sha256 or sha256_file(path)  # the hub's was compared
        listed = book.listed.get(file.name.rpartition("/")[2])
        if listed and (listed["sha256"], listed["tokens"]) != (shard["sha256"], shard["tokens"]):
            raise UserError(f"{file.name}: is not the shard that its {MANIFEST} lists (another sha256); it was changed since")
    except BaseException:
        path.unlink()
        raise
    book.add(shard, path)
    if not quiet():
        tqdm.write(f"{planned.name}: {shard['tokens']:,} tokens, from {file.name}")


def link_or_copy(path: Path, new: Path) -> None:
    """Make `new` a second name of the file where the file system allows it, else a copy."""
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, new)


def inspect(path: Path, source_name: str, name: str, whose: Vocabulary) -> dict[str, Any]:
    """The manifest's entry for the shard at `path`, without its sha256. Raises UserError, naming `source_name`."""
    try:
        tokens = open_shard(path)
    except UserError as error:
        raise UserError(f"{source_name}: {str(error).removeprefix(f'{path}: ')}") from None
    documents = 0
    for start in range(0, len(tokens), LOOK_TOKENS):
        part = tokens[start : start + LOOK_TOKENS]
        if part.max() >= whose.n_vocab:
            tokenizer = "GPT-2's tokenizer" if whose.tokenizer == GPT2.name else f"its tokenizer {whose.tokenizer!r}"
            raise UserError(
                f"{source_name}: token {start + int(part.argmax())} is {part.max()}, {tokenizer} has {whose.n_vocab:,} "
                "ids; it is a shard of another tokenizer, or damaged"
            )
        documents += int(np.count_nonzero(part == whose.eot)) if whose.eot is not None else 0
    return {"file": name, "split": name.partition("_")[0], "tokens": len(tokens), "documents": documents}


def good_shards(out: Path, shards: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """Those of `shards` that lie in `out` as they were noted, to the last bit."""

    def is_good(shard: dict[str, Any]) -> bool:
        path = out / shard["file"]
        return os.path.isfile(path) and sha256_file(path) == shard["sha256"]

    with ThreadPool(workers) as pool:
        return [shard for shard, good in zip(shards, pool.map(is_good, shards), strict=True) if good]
