"""Token shards → batches. The loader keeps no state: a batch is a pure function of (step, micro-step, rank).

Step s trains on tokens [s·N, (s+1)·N) of the concatenated training shards, N = tokens_per_step, wrapping at the end.
Ranks and micro-steps only slice that range, so the loss curve depends on neither, and any step can be replayed.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor

from core.config import grad_accum
from core.errors import UserError
from core.files import sha256_file
from text.shards import FileName, find_shards, open_shard, read_manifest

VERIFY_TOKENS = 1 << 24  # looked through at a time
HELD = 256  # shards that a stream keeps mapped; each holds a file open, and a process may have 1024


class ShardRecord(BaseModel):
    """A shard as a run saw it. While size and time of change stay the same its sha256 is not computed again."""

    model_config = ConfigDict(frozen=True, strict=True)

    file: FileName
    tokens: NonNegativeInt
    sha256: str
    mtime_ns: int


class TokenStream:
    """The tokens of one split's shards, end to end; memory-mapped, `HELD` of them at a time.

    Raises UserError for a missing or damaged shard, one that the manifest does not know, or a vocabulary larger than
    `vocab_size`; `read` raises it for a token id beyond `vocab_size` and a shard that is no longer the same file.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int) -> None:
        self.folder, self.vocab_size = Path(folder), vocab_size
        self.paths = find_shards(self.folder, split)
        self.lengths = [len(open_shard(path)) for path in self.paths]
        self._seen = [_identity(path) for path in self.paths]
        self.ends = np.cumsum(self.lengths)
        self.shard = lru_cache(HELD)(self._map)  # index → its tokens
        if split == "val" and len(self) < 2:
            raise UserError(f"{self.paths[0]}: one token, there is nothing in it to predict; prepare the data again")
        self.sums: dict[str, str] = {}  # file → sha256, once it is computed
        self.manifest = read_manifest(self.folder)
        if self.manifest:
            self._check_manifest(split, self.manifest)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _map(self, index: int) -> np.ndarray:
        path = self.paths[index]
        tokens = open_shard(path)
        if _identity(path) != self._seen[index]:
            raise UserError(f"{path}: was changed while it was in use; the same command looks at it anew", alone=True)
        return tokens

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer that made the shards; GPT-2's where no manifest says."""
        return self.manifest["tokenizer"] if self.manifest else "gpt2"

    def locate(self, start: int) -> str:
        """Where token `start` of the stream lies, in words: the shard and the token in it."""
        index, offset = self._find(start % len(self))
        return f"{self.paths[index]}, token {offset}"

    def _find(self, start: int) -> tuple[int, int]:
        """The shard that holds token `start` of the stream, and the token in it."""
        index = int(np.searchsorted(self.ends, start, side="right"))
        return index, start - int(self.ends[index]) + self.lengths[index]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start+count−1, (count,) uint16; positions are taken modulo the length of the stream."""
        parts, need, start = [], count, start % len(self)
        while need:
            index, offset = self._find(start)
            part = self.shard(index)[offset : offset + need]
            if part.max() >= self.vocab_size:
                self._refuse_id(self.paths[index], offset + int(part.argmax()), int(part.max()))
            parts.append(part if len(part) == count else part.copy())  # a copy holds no file open
            need -= len(part)
            start = (start + len(part)) % len(self)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def records(self) -> list[ShardRecord]:
        """What the shards are known by; the sha256 is the manifest's, or computed where there is none."""
        listed = {shard["file"]: shard["sha256"] for shard in self.manifest["shards"]} if self.manifest else {}
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda path: listed.get(path.name) or self._sum(path), self.paths)
            return [
                ShardRecord(file=path.name, tokens=tokens, sha256=sha256, mtime_ns=path.stat().st_mtime_ns)
                for path, tokens, sha256 in zip(self.paths, self.lengths, sums, strict=True)
            ]

    def sha256(self) -> list[str]:
        """Of each shard, in their order."""
        return [record.sha256 for record in self.records()]

    def verify(self) -> None:
        """Read every token: ids below `vocab_size`, and the sha256 of the manifest. Raises UserError, naming the shard."""
        for index, path in enumerate(self.paths):
            for start in range(0, self.lengths[index], VERIFY_TOKENS):
                part = self.shard(index)[start : start + VERIFY_TOKENS]
                if part.max() >= self.vocab_size:
                    self._refuse_id(path, start + int(part.argmax()), int(part.max()))
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(self._sum, self.paths))
        for record, path, sha256 in zip(self.records(), self.paths, sums, strict=True):
            if record.sha256 != sha256:
                raise UserError(f"{path}: its sha256 is not the manifest's; the file was changed, prepare the data again")

    def _sum(self, path: Path) -> str:
        if path.name not in self.sums:
            self.sums[path.name] = sha256_file(path)
        return self.sums[path.name]

    def _refuse_id(self, path: Path, where: int, token: int) -> None:
        raise UserError(f"{path}: token {where} is {token}, beyond vocab_size = {self.vocab_size}", alone=True)

    def _check_manifest(self, split: str, manifest: dict[str, Any]) -> None:
        listed = {s["file"]: s["tokens"] for s in manifest["shards"] if s["split"] == split}
        found = {path.name: tokens for path, tokens in zip(self.paths, self.lengths, strict=True)}
        for name in sorted(listed.keys() | found.keys()):
            if listed.get(name) != found.get(name):
                raise UserError(
                    f"{self.folder / name}: {found.get(name, 'no')} tokens, the manifest says "
                    f"{listed.get(name, 'no such shard')}; the folder mixes two preparations, prepare the data again"
                )
        if manifest["n_vocab"] > self.vocab_size:
            raise UserError(
                f"{self.folder}: its tokenizer {self.tokenizer!r} has {manifest['n_vocab']} ids, "
                f"vocab_size = {self.vocab_size} is too small for it"
            )


def _identity(path: Path) -> tuple[int, ...]:
    """What is another when a file's contents change, or another file takes its place."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Batches:
    """batches[step, micro] → x_BT, y_BT (int64, on this rank's device); y is x moved on by one token.

    Micro-step m of rank r takes the rows (m · world_size + r) · B … of the step's N / T rows. `ahead` (on a GPU, unless said
    otherwise) lets a thread read the batch that comes next while this one is computed on; what is asked for decides what is
    returned, and a batch that cannot be read is refused when it is asked for.
    """

    def __init__(self, cfg: Any, split: str, dist: Any, ahead: bool | None = None) -> None:
        self.cfg, self.dist = cfg, dist
        self.stream = TokenStream(cfg.data, split, cfg.vocab_size)
        self.grad_accum = grad_accum(cfg, dist.world_size)
        on_gpu = dist.device.type == "cuda"
        self._reader = ThreadPoolExecutor(1, "batches", self._use_device) if (on_gpu if ahead is None else ahead) else None
        self._next: tuple[tuple[int, int], Future[Tensor]] | None = None

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, micro = index
        self.dist.at(f"step {step}, micro-step {micro}, reading the batch")
        ids = self._take(index) if self._reader else self._read(index)
        self.dist.at(f"step {step}, micro-step {micro}, computing")
        ids, length = ids.to(self.dist.device, non_blocking=ids.is_pinned()), self.cfg.block_size
        return ids[:-1].view(-1, length), ids[1:].view(-1, length)

    def _read(self, index: tuple[int, int]) -> Tensor:
        """The ids of a batch and one more, in host memory."""
        n_tokens = self.cfg.micro_batch * self.cfg.block_size
        return to_ids(self.stream.read(self.start(*index), n_tokens + 1), self.dist.device)

    def _take(self, index: tuple[int, int]) -> Tensor:
        """What was read ahead, if it is what is asked for; the thread goes on to the batch after it."""
        assert self._reader
        (guess, future), (step, micro) = self._next or (None, None), index
        ids = future.result() if future and guess == index else self._read(index)
        following = (step, micro + 1) if micro + 1 < self.grad_accum else (step + 1, 0)
        self._next = following, self._reader.submit(self._read, following)
        return ids

    def _use_device(self) -> None:
        if self.dist.device.type == "cuda":
            torch.cuda.set_device(self.dist.device)  # a thread's own setting; pinned memory would be made with the first GPU

    def start(self, step: int, micro: int) -> int:
        """The batch's first token in the stream."""
        row = (micro * self.dist.world_size + self.dist.rank) * self.cfg.micro_batch
        return step * self.cfg.tokens_per_step + row * self.cfg.block_size


def check_unchanged(before: Sequence[ShardRecord], streams: Sequence[TokenStream]) -> list[ShardRecord]:
    """`before` as of now. Raises UserError where a shard is not the one a run began with.

    A shard of another time of change is read: its sha256 decides, as it does where `verify` has computed it.
    """
    shards = {path.name: (path, tokens) for s in streams for path, tokens in zip(s.paths, s.lengths, strict=True)}
    sums = {file: sha256 for stream in streams for file, sha256 in stream.sums.items()}
    way_out = "a run ends on the data it began with; restore the file, or start a run of another --name"
    now = []
    for old in before:
        path, tokens = shards.pop(old.file, (streams[0].folder / old.file, None))
        if tokens != old.tokens:
            raise UserError(f"{path}: {tokens or 'no'} tokens, the run began with {old.tokens}; {way_out}")
        mtime_ns = path.stat().st_mtime_ns
        if mtime_ns != old.mtime_ns and old.file not in sums:
            sums[old.file] = sha256_file(path)
        if sums.get(old.file, old.sha256) != old.sha256:
            raise UserError(f"{path}: was changed since the run began, its sha256 is another; {way_out}")
        now.append(old.model_copy(update={"mtime_ns": mtime_ns}))
    if shards:
        raise UserError(f"{streams[0].folder / min(shards)}: was not there when the run began; {way_out}")
    return now


def to_ids(tokens: np.ndarray, device: torch.device) -> Tensor:
    """Tokens as int64 in host memory, which is pinned where `device` is a GPU."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return ids.pin_memory() if device.type == "cuda" else ids
