"""Token shards → batches. The loader keeps no state: a batch is a pure function of (step, micro-step, rank).

Step s trains on tokens [s·N, (s+1)·N) of the concatenated training shards, N = tokens_per_step, wrapping at the end.
Ranks and micro-steps only slice that range, so the loss curve depends on neither, and any step can be replayed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import grad_accum
from errors import UserError
from shards import find_shards, open_shard, read_manifest


class TokenStream:
    """The tokens of one split's shards, end to end; memory-mapped.

    Raises UserError for a missing or damaged shard, one that the manifest does not know, or a vocabulary larger than
    `vocab_size`; `read` raises it for a token id beyond `vocab_size`.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int) -> None:
        self.folder, self.vocab_size = Path(folder), vocab_size
        self.paths = find_shards(self.folder, split)
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.manifest = read_manifest(self.folder)
        if self.manifest:
            self._check_manifest(split, self.manifest)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer that made the shards; GPT-2's where no manifest says."""
        return self.manifest["tokenizer"] if self.manifest else "gpt2"

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start+count−1, (count,) uint16; positions are taken modulo the length of the stream."""
        parts, need, start = [], count, start % len(self)
        while need:
            index = int(np.searchsorted(self.ends, start, side="right"))
            shard = self.shards[index]
            offset = start - int(self.ends[index]) + len(shard)
            part = shard[offset : offset + need]
            if part.max() >= self.vocab_size:
                where = offset + int(part.argmax())
                raise UserError(f"{self.paths[index]}: token {where} is {part.max()}, beyond vocab_size = {self.vocab_size}")
            parts.append(part)
            need -= len(part)
            start = (start + len(part)) % len(self)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_manifest(self, split: str, manifest: dict[str, Any]) -> None:
        listed = {s["file"]: s["tokens"] for s in manifest["shards"] if s["split"] == split}
        found = {path.name: len(shard) for path, shard in zip(self.paths, self.shards, strict=True)}
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


class Batches:
    """batches[step, micro] → x_BT, y_BT (int64, on this rank's device); y is x moved on by one token.

    Micro-step m of rank r takes the rows (m · world_size + r) · B … of the step's N / T rows.
    """

    def __init__(self, cfg: Any, split: str, dist: Any) -> None:
        self.cfg, self.dist = cfg, dist
        self.stream = TokenStream(cfg.data, split, cfg.vocab_size)
        self.grad_accum = grad_accum(cfg, dist.world_size)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, micro = index
        n_tokens = self.cfg.micro_batch * self.cfg.block_size
        start = step * self.cfg.tokens_per_step + (micro * self.dist.world_size + self.dist.rank) * n_tokens
        return to_batch(self.stream.read(start, n_tokens + 1), self.cfg.block_size, self.dist.device)


def to_batch(tokens: np.ndarray, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n·length+1 tokens → inputs and targets, (n, length) int64 each, on `device`."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    return ids[:-1].view(-1, length), ids[1:].view(-1, length)
