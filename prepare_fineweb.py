"""Turn text into shards of uint16 tokens, the form in which training reads it.

python prepare_fineweb.py                                    # FineWeb-Edu sample-10BT → data/fineweb-edu-10B, 10B tokens, 20 GB
python prepare_fineweb.py --source demo                      # the English inside Python, as bytes → data/demo, 2 MB
python prepare_fineweb.py --source 'texts/*.parquet' notes/ --out data/mine
python prepare_fineweb.py --source allenai/c4 --config en --limit_tokens 1_000_000_000 --out data/c4
python prepare_fineweb.py --pretokenized kjj0/finewebedu10B-gpt2    # 10B tokens of FineWeb-Edu that others have tokenized

The stream is <|endoftext|> before each document, documents in the source's order, special tokens in a text encoded as
text; shard 0 is validation. That is token for token what build-nanogpt's and llm.c's fineweb.py write. Interrupted at
any point, the same command continues and ends with the same bytes, whatever the number of workers.
"""

import argparse
import os
import platform
import re
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from core.console import CommandLine, given_path
from core.errors import UserError, command
from core.files import locked, write_json
from core.host import TO_LEAVE, signals_to
from text.corpus import SUFFIXES, Source
from text.pretokenized import FINEWEB_TOKENS, adopt
from text.progress import check_space, progress_bar
from text.shard_writer import scratch_in
from text.shards import MANIFEST, SHARD_SUFFIXES, read_manifest
from text.sources import is_hub, open_source
from text.token_stream import (
    PROGRESS,
    ShardFolder,
    encode_in_order,
    intact,
    read_batches,
    read_earlier,
    refuse_other_work,
)
from text.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer

FINEWEB = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT"
BYTES_PER_TOKEN = {"gpt2": 4.4, "bytes": 1.0}  # of English, to estimate with
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
DOWNLOADS = 4  # at a time


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    source: list[str]
    out: Path
    tokenizer: str
    shard_tokens: int
    val_tokens: int | None  # None: as an earlier start had it, else by the source's size
    limit_tokens: int | None
    workers: int
    pretokenized: str | None = None
    column: str = "text"
    config: str | None = None
    split: str | None = None

    @property
    def terms(self) -> dict[str, Any]:
        """What decides the bytes of the shards, together with the source's files."""
        names = ("source", "config", "split", "column", "tokenizer", "shard_tokens", "val_tokens", "limit_tokens")
        return {name: getattr(self, name) for name in names}


def prepare(job: Job) -> None:
    """Write the shards and the manifest of `job`, or what is missing of them. Raises UserError."""
    if job.pretokenized:
        return adopt(job.pretokenized, job.out, job.limit_tokens, job.workers)
    tokenizer = load_tokenizer(job.tokenizer)
    try:
        with locked(job.out), scratch_in(job.out) as scratch:
            earlier, finished = read_earlier(job.out)
            job = replace(job, val_tokens=job.val_tokens or earlier.get("val_tokens"))
            refuse_other_work(job.out, earlier, job.terms)
            if not (finished and is_hub(job.source)):  # a finished folder pins the hub's revision, no need to ask
                names = [name for name, _ in earlier.get("files", [])]
                revision = earlier.get("revision")
                source = open_source(job.source, scratch, revision, job.column, job.config, job.split, names)
                files = [[file.name, file.size] for file in source.files]
                refuse_other_work(job.out, earlier, {"files": files})
            if not finished:
                hundredth = expected_tokens(source, job.tokenizer, job.limit_tokens) // 100
                job = replace(job, val_tokens=job.val_tokens or min(job.shard_tokens, max(1000, hundredth)))
                terms = job.terms | {"revision": source.revision, "files": files}
                write_folder(job, source, tokenizer, terms, intact(job.out, earlier.get("shards", [])))
            (job.out / PROGRESS).unlink(missing_ok=True)
            report(job.out, "finished already" if finished else "finished")
    except OSError as error:
        raise UserError(f"{error.filename or job.out}: {error.strerror or error}") from None


def write_folder(job: Job, source: Source, tokenizer: Tokenizer, terms: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Go on after the finished `shards`, write the rest, and last the manifest."""
    if job.limit_tokens and job.limit_tokens <= terms["val_tokens"]:
        raise UserError(
            f"--limit_tokens {job.limit_tokens:,} is all taken by the {job.val_tokens:,} tokens of validation, nothing is left "
            "to train on; raise it or give a smaller --val_tokens"
        )
    for leftover in job.out.glob(".*.tmp"):
        leftover.unlink()
    expected = expected_tokens(source, job.tokenizer, job.limit_tokens)
    need = 2 * max(0, expected - sum(shard["tokens"] for shard in shards)) + source.fetch_bytes  # one fetched file at a time
    check_space(job.out, f"about {expected:,} tokens from {len(source.files)} files", need)
    with ShardFolder(job.out, terms, tokenizer.eot, shards) as folder, progress_bar(expected, folder.n_tokens) as bar:
        with closing(encode_in_order(read_batches(source, folder.end, job.column), tokenizer, job.workers)) as stream:
            for encoded in stream:
                folder.append(encoded)
                bar.update(folder.n_tokens - bar.n)
                if folder.at_limit:
                    break
        folder.close()
        bar.total = bar.n
    manifest = terms | {
        "n_vocab": tokenizer.n_vocab,
        "eot": tokenizer.eot,
        "tokens": folder.n_tokens,
        "documents": sum(shard["documents"] for shard in folder.shards),
        "skipped": {"null": folder.end.null, "empty": folder.end.empty},
        "shards": [{key: value for key, value in shard.items() if key != "end"} for shard in folder.shards],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "pyarrow", "tiktoken")},
    }
    write_json(job.out / MANIFEST, manifest)


def expected_tokens(source: Source, tokenizer: str, limit_tokens: int | None) -> int:
    """About how many tokens `source` gives, by the sizes of its files."""
    expected = int(sum(file.text_bytes for file in source.files) / BYTES_PER_TOKEN[tokenizer])
    return min(expected, limit_tokens) if limit_tokens else expected


def report(out: Path, state: str) -> None:
    """Say what is in the finished folder. Raises UserError if a shard is missing or has the wrong size."""
    manifest = read_manifest(out) or {}
    shards = manifest["shards"]
    good = intact(out, shards)
    if len(good) < len(shards):
        raise UserError(f"{out / shards[len(good)]['file']}: missing or damaged; delete {out} and prepare the data again")
    print(f"{out}: {state}, {manifest['tokens']:,} tokens of {manifest['documents']:,} documents in {len(shards)} shards")


def positive(text: str) -> int:
    """A whole number above 0, as 100000000 or 100_000_000."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def shard_size(text: str) -> int:
    """A number of tokens that a shard's header can hold."""
    if positive(text) > MAX_SHARD_TOKENS:
        raise argparse.ArgumentTypeError(f"{text} is above {MAX_SHARD_TOKENS:,}, the most a shard's header can say")
    return positive(text)


def n_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_args(argv: list[str]) -> Job:
    """The command line as a Job; flags may have underscores or hyphens. Raises UserError."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add(
        "--source", type=given_path, nargs="+", action="extend", metavar="WHERE",
        help="a dataset on the hub, OWNER/NAME[@REVISION], or its parquet files in a folder, hf://datasets/OWNER/NAME[@REVISION]/"
        "FOLDER (HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honored); or local files, folders and quoted patterns: "
        f"{SUFFIXES}, what save_to_disk writes (a txt file is one document); or demo (default: {FINEWEB})",
    )  # fmt: skip
    add("--config", metavar="NAME", help="a configuration of the dataset, as sample-10BT (default: its only or default one)")
    add("--split", metavar="NAME", help="which split of the dataset on the hub, or of a save_to_disk folder (default: train)")
    add("--column", default="text", metavar="NAME", help="the column, or the key, that holds the text (default: text)")
    add(
        "--pretokenized", type=given_path, metavar="WHERE",
        help="instead of text, shards of tokens: OWNER/NAME[@REVISION][/FOLDER] on the hub or a local folder, with .bin files "
        "of llm.c or nanoGPT or .npy files of build-nanogpt; GPT-2's tokens where no manifest.json says otherwise; what says "
        "val is validation, else the first",
    )  # fmt: skip
    add("--out", type=given_path, metavar="FOLDER", help="where the shards go (default: data/fineweb-edu-10B, demo data/demo)")
    add("--tokenizer", help=f"{' or '.join(TOKENIZERS)} (default: gpt2, for the demo bytes)")
    of: dict[str, Any] = {"type": shard_size, "metavar": "N"}
    add("--shard_tokens", **of, help="tokens per shard (default: 100_000_000, demo 1_000_000)")
    add(
        "--val_tokens", **of, help="of validation (default: one in a hundred, at most a shard; of hf://… a shard, demo 200_000)"
    )
    of = {"type": positive, "metavar": "N"}
    add("--limit_tokens", **of, help="stop after so many tokens in all, of shards after the one that has them (default: all)")
    add("--workers", **of, help=f"encoding threads (default: all cores, {n_cores()} here) or downloads (default: {DOWNLOADS})")
    args = parser.parse_args([re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv])
    if args.pretokenized:
        return pretokenized_job(args)
    workers = args.workers or n_cores()
    source, demo = args.source or [FINEWEB], args.source == ["demo"]
    out = args.out or {FINEWEB: "data/fineweb-edu-10B", "demo": "data/demo"}.get(" ".join(source))
    if out is None:
        raise UserError(f"--source {' '.join(source)}: say with --out which folder its shards go to, e.g. --out data/mine")
    shard_tokens = args.shard_tokens or (1_000_000 if demo else 100_000_000)
    tokenizer = args.tokenizer or ("bytes" if demo else "gpt2")
    val_tokens = args.val_tokens or (200_000 if demo else shard_tokens if source[0].startswith("hf://") else None)
    of_the_source = {"column": args.column, "config": args.config, "split": args.split}
    return Job(source, Path(out), tokenizer, shard_tokens, val_tokens, args.limit_tokens, workers, **of_the_source)


def pretokenized_job(args: argparse.Namespace) -> Job:
    """The Job of --pretokenized, which leaves nothing to choose about the tokens. Raises UserError."""
    where = args.pretokenized
    for name in ("source", "config", "split", "column", "tokenizer", "shard_tokens", "val_tokens"):
        if getattr(args, name) not in (None, "gpt2", "text"):
            raise UserError(f"--{name} does not go with --pretokenized: the shards are taken as they are")
    out = args.out or {FINEWEB_TOKENS: "data/fineweb-edu-10B"}.get(where)
    if out is None:
        raise UserError(f"--pretokenized {where}: say with --out which folder its shards go to, e.g. --out data/mine")
    return Job([], Path(out), "gpt2", 0, 0, args.limit_tokens, args.workers or DOWNLOADS, where)


class Interrupted(KeyboardInterrupt):
    """A signal to leave, whose number it holds."""


def interrupt(number: int) -> NoReturn:
    """What these signals do."""
    raise Interrupted(number)


@command(work_in_files=True)
def main() -> int:
    """Prepare what the command line asks for."""
    job = parse_args(sys.argv[1:])
    try:
        with signals_to(interrupt, *TO_LEAVE):
            prepare(job)
    except Interrupted as stop:
        n_shards = sum(len(list(job.out.glob(f"*{suffix}"))) for suffix in SHARD_SUFFIXES)
        print(
            f"interrupted: {n_shards} shards are finished in {job.out}; the same command continues after them", file=sys.stderr
        )
        return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    main()
