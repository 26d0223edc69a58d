"""Shards that others have tokenized, from the hub or a local folder, into a data folder of ours.

The files are llm.c's .bin or build-nanogpt's .npy, of GPT-2's tokens. Nothing is decoded or encoded: each is checked (header,
size, sha256, range of ids) beside its place and moved there whole; manifest.json comes last.
"""

import os
import platform
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from system.console import quiet, remark
from system.errors import UserError
from system.files import locked, put_in_place, sha256_file, write_json
from text.hub import HUB, HubFiles, difference
from text.progress import gigabytes
from text.shards import HEADER_BYTES, MANIFEST, SCRATCH, SHARD_SUFFIXES, ShardEntry, open_shard
from text.sources import SourceFile
from text.token_stream import Earlier, read_earlier, refuse_other_work
from text.tokenizer import GPT2

FINEWEB_TOKENS = "kjj0/finewebedu10B-gpt2"  # sample-10BT of FineWeb-Edu, by llm.c's script
PROGRESS = ".pretokenized.json"  # not the name that text has: the one cannot go on from the other
NPY_HEADER_BYTES = 128  # as numpy writes them; only to tell the number of tokens before the file is there
LOOK_TOKENS = 1 << 24  # looked through at a time


class Unfinished(Earlier):
    """The progress file."""

    shards: list[ShardEntry] = []  # noqa: RUF012


class Planned(NamedTuple):
    """File number `file` of a source, to become the shard `name`."""

    file: int
    name: str
    tokens: int  # by its size


class FolderShards:
    """The shards in a local folder; they stay there."""

    revision = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.stopped = folder, threading.Event()
        found = [path for path in folder.iterdir() if path.suffix in SHARD_SUFFIXES and path.name[0] != "." and path.is_file()]
        self.files = [SourceFile(path.name, path.stat().st_size, 0) for path in found]
        if not found:
            raise UserError(f"--pretokenized {folder}: no {' or '.join(SHARD_SUFFIXES)} files there")

    def cached(self, file: SourceFile) -> Path:
        """The file as it lies."""
        return self.folder / file.name

    def download(self, index: int) -> Path:
        """Nothing can be brought into a folder. Raises UserError."""
        raise UserError(f"{self.folder / self.files[index].name}: was changed while it was read")

    def missing_bytes(self, index: int) -> int:
        """What a copy takes."""
        return self.files[index].size


def adopt(where: str, out: Path, limit_tokens: int | None, workers: int) -> None:
    """Make `out` a data folder of the shards at `where`, or bring what is missing or damaged of them. Raises UserError.

    `limit_tokens` is kept by whole shards, the fewest that have as many; `workers` files come at a time.
    """
    terms = {"pretokenized": where, "tokenizer": GPT2.name, "limit_tokens": limit_tokens}
    try:
        with locked(out):
            earlier, finished = read_earlier(out, PROGRESS, Unfinished)
            refuse_other_work(out, earlier, terms)
            good = good_shards(out, earlier.get("shards", []), workers)
            if not finished or len(good) < len(earlier["shards"]):
                source = open_source(where, out, earlier.get("revision"))
                planned = plan(where, source.files, limit_tokens)
                files = [[source.files[p.file].name, source.files[p.file].size] for p in planned]
                refuse_other_work(out, earlier, {"files": files})
                finished = False
                good = bring_all(
                    source, planned, Book(out, terms | {"revision": source.revision, "files": files}, good), workers
                )
            tokens, documents = (sum(shard[key] for shard in good) for key in ("tokens", "documents"))
            state = "finished already, every sha256 is right" if finished else "finished"
            print(f"{out}: {state}, {tokens:,} tokens of {documents:,} documents in {len(good)} shards")
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None


def open_source(where: str, out: Path, revision: str | None) -> HubFiles | FolderShards:
    """The files that `where` names, a folder before a dataset of the same name. Raises UserError where there are none."""
    folder = Path(where)
    if folder.is_dir():
        return FolderShards(folder)
    url = where if where.startswith("hf://") else f"hf://datasets/{where}"
    if where[0] in "./~" or not HUB.fullmatch(url):
        raise UserError(f"--pretokenized {where}: no folder here, nor OWNER/NAME[@REVISION][/FOLDER] of a dataset on the hub")
    return HubFiles(url, out / SCRATCH, revision, SHARD_SUFFIXES, "--pretokenized")


def plan(where: str, files: list[SourceFile], limit_tokens: int | None) -> list[Planned]:
    """The shards to have, validation first, named and numbered as ours: val_000000, train_000001, …

    Validation is what says "val" in its name, else the first file. Raises UserError where nothing would be left to train on.
    """
    if len(folders := sorted({file.name.rpartition("/")[0] for file in files})) > 1:
        raise UserError(f"--pretokenized {where}: shards lie in several folders, name one: {', '.join(folders[:5])}")

    def key(index: int) -> list[Any]:  # numbers in a name count as numbers
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", files[index].name)]

    order = sorted(range(len(files)), key=key)
    val = [i for i in order if "val" in files[i].name.rpartition("/")[2].lower()] or order[:1]
    train = [i for i in order if i not in val]
    if not train:
        raise UserError(f"--pretokenized {where}: {files[val[0]].name} is for validation, and there is no shard to train on")
    planned, tokens = [], 0
    for number, index in enumerate(val + train):
        if limit_tokens and number > len(val) and tokens >= limit_tokens:
            break
        suffix = Path(files[index].name).suffix
        planned.append(Planned(index, f"{'val' if index in val else 'train'}_{number:06d}{suffix}", n_tokens(files[index])))
        tokens += planned[-1].tokens
    return planned


def n_tokens(file: SourceFile) -> int:
    """The tokens in a file of this size."""
    return max(0, file.size - (NPY_HEADER_BYTES if file.name.endswith(".npy") else HEADER_BYTES)) // 2


class Book:
    """The shards that `out` has, kept in the progress file and at the end in the manifest."""

    def __init__(self, out: Path, terms: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        self.out, self.terms = out, terms
        self.shards = {shard["file"]: shard for shard in shards}
        self._lock = threading.Lock()

    def write(self) -> None:
        """The progress file, for a later start."""
        write_json(self.out / PROGRESS, self.terms | {"shards": list(self.shards.values())})

    def add(self, shard: dict[str, Any], path: Path) -> None:
        """Put a checked file in its place. It is noted before: killed between the two, a start finds it where it came in."""
        with self._lock:
            self.shards[shard["file"]] = shard
            self.write()
            put_in_place(path, self.out / shard["file"])

    def finish(self, names: list[str]) -> list[dict[str, Any]]:
        """Write the manifest; returns its shards, in the order of `names`."""
        shards = [self.shards[name] for name in names]
        totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
        versions = {"python": platform.python_version(), "numpy": np.__version__, "huggingface_hub": version("huggingface_hub")}
        about = {"n_vocab": GPT2.n_vocab, "eot": GPT2.eot} | totals | {"shards": shards, "versions": versions}
        write_json(self.out / MANIFEST, self.terms | about)
        (self.out / PROGRESS).unlink()
        shutil.rmtree(self.out / SCRATCH, ignore_errors=True)
        return shards


def bring_all(source: HubFiles | FolderShards, planned: list[Planned], book: Book, workers: int) -> list[dict[str, Any]]:
    """Bring every planned shard that `book` has not, then write the manifest; returns all of them."""
    todo = [p for p in planned if p.name not in book.shards]
    check_space(source, planned, todo, book.out)
    with leaving_nothing_useless(book):
        book.write()
        (book.out / MANIFEST).unlink(missing_ok=True)  # a shard is damaged: until it is whole again the folder is unfinished
        if todo:
            bring(source, todo[0], book)  # alone: what is no shard is found out before everything is downloaded
        with ThreadPoolExecutor(workers) as pool:
            try:
                futures = [pool.submit(bring, source, p, book) for p in todo[1:]]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                source.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return book.finish([p.name for p in planned])


def check_space(source: HubFiles | FolderShards, planned: list[Planned], todo: list[Planned], out: Path) -> None:
    """Say what is to come. Raises UserError if the disk is too small for it."""
    need = sum(0 if linkable(source.cached(source.files[p.file]), out) else source.missing_bytes(p.file) for p in todo)
    tokens, free = sum(p.tokens for p in planned), shutil.disk_usage(out).free
    remark(
        f"{out}: {tokens:,} tokens in {len(planned)} shards, {len(planned) - len(todo)} are there; the rest needs "
        f"{gigabytes(need)}, {gigabytes(free)} are free",
        stdout=True,
    )
    if need > free:
        raise UserError(
            f"{out}: too little space, {gigabytes(need)} are needed and {gigabytes(free)} free; make room, choose another "
            "--out or a smaller --limit_tokens"
        )


def linkable(path: Path | None, out: Path) -> bool:
    """Whether `path` lies on the same file system as `out`, where a second name takes no space."""
    return path is not None and path.stat().st_dev == out.stat().st_dev


def bring(source: HubFiles | FolderShards, planned: Planned, book: Book) -> None:
    """Have one shard in its place: linked or copied from the cache or the folder where it is whole there, else downloaded."""
    file, scratch = source.files[planned.file], book.out / SCRATCH
    there = source.cached(file)
    if there is not None and not difference(there, file):
        scratch.mkdir(exist_ok=True)
        path = link_or_copy(there.resolve(), scratch / planned.name)
    else:
        path = source.download(planned.file)
    try:
        shard = inspect(path, file.name, planned.name)
        shard["sha256"] = file.sha256 or sha256_file(path)  # the hub's was compared
    except BaseException:
        path.unlink()
        raise
    book.add(shard, path)
    if not quiet():
        tqdm.write(f"{planned.name}: {shard['tokens']:,} tokens, from {file.name}")


def link_or_copy(path: Path, new: Path) -> Path:
    """`new`, a second name of the file where the file system allows it, else a copy."""
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, new)
    return new


def inspect(path: Path, source_name: str, name: str) -> dict[str, Any]:
    """The manifest's entry for the shard at `path`, without its sha256. Raises UserError, naming `source_name`."""
    try:
        tokens = open_shard(path)
    except UserError as error:
        raise UserError(f"{source_name}: {str(error).removeprefix(f'{path}: ')}") from None
    documents = 0
    for start in range(0, len(tokens), LOOK_TOKENS):
        part = tokens[start : start + LOOK_TOKENS]
        if part.max() >= GPT2.n_vocab:
            raise UserError(
                f"{source_name}: token {start + int(part.argmax())} is {part.max()}, GPT-2's tokenizer has {GPT2.n_vocab:,} "
                "ids; it is a shard of another tokenizer, or damaged"
            )
        documents += int(np.count_nonzero(part == GPT2.eot))
    return {"file": name, "split": name.partition("_")[0], "tokens": len(tokens), "documents": documents}


def good_shards(out: Path, shards: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """Those of `shards` that lie in `out` as they were noted, to the last bit."""

    def is_good(shard: dict[str, Any]) -> bool:
        path = out / shard["file"]
        return path.is_file() and sha256_file(path) == shard["sha256"]

    with ThreadPoolExecutor(workers) as pool:
        return [shard for shard, good in zip(shards, pool.map(is_good, shards), strict=True) if good]


@contextmanager
def leaving_nothing_useless(book: Book) -> Iterator[None]:
    """After an error keep what a later start goes on with; where that is nothing, no file stays."""
    try:
        yield
    finally:
        scratch = book.out / SCRATCH
        for folder in [*scratch.glob("*/"), scratch]:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()
        if not book.shards and not scratch.exists():
            (book.out / PROGRESS).unlink(missing_ok=True)
