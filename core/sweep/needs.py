"""What the runs of a plan need on disk: tokens to read, space for checkpoints and for the shards that are not there yet."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import free_bytes, list_checkpoints
from core.config import Config
from core.data import TokenStream
from core.errors import UserError
from core.sweep.plan import Entry
from core.sweep.scaling import CHECKPOINT_BYTES, EVALUATION_SET
from model import GPT
from text.progress import gigabytes

Found = dict[str, Any]  # what a check has found: its `line` for people, figures, and its `problem` in words if there is one
Needs = Counter[tuple[Path, str]]  # (folder, what) → bytes to come

ENOUGH = 0.95  # of the tokens a run reads: FineWeb-Edu's 10B without the validation shard are 99 % of them


def check_files(todo: Sequence[Entry]) -> tuple[dict[str, Found], list[Found]]:
    """By data folder, its tokens beside those that a run reads; by disk, the space on it beside what is to come."""
    most = {e.cfg.data: e.cfg for e in sorted(todo, key=lambda e: e.cfg.steps * e.cfg.tokens_per_step)}
    tokens = {folder: check_tokens(cfg) for folder, cfg in most.items()}
    needs: Needs = Counter({(Path(folder), "shards"): one["missing_bytes"] for folder, one in tokens.items()})
    sizes = [CHECKPOINT_BYTES * n_parameters(entry.cfg) for entry in todo]
    for cfg, size in zip((entry.cfg for entry in todo), sizes, strict=True):
        kept = cfg.keep_checkpoints + 1  # the newest and the best
        needs[Path(cfg.out_dir), "checkpoints"] += max(0, kept - len(list_checkpoints(cfg.folder))) * size
    needs[Path(todo[0].cfg.out_dir), "checkpoints"] += max(sizes)  # the one being written
    disks: dict[int, Needs] = {}
    for (folder, what), size in needs.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disks.setdefault(there.stat().st_dev, Counter())[folder, what] = size
    return tokens, [check_space(needs) for needs in disks.values()]


def n_parameters(cfg: Config) -> int:
    """Parameters of the model, positional encoding and all; it is not made for that."""
    with torch.device("meta"):
        return GPT(cfg).n_params()["total"]


def check_tokens(cfg: Config) -> Found:
    """The tokens in cfg.data beside those that a run reads, and the bytes of shards that are missing."""
    wanted = cfg.steps * cfg.tokens_per_step
    try:
        have, val = (len(TokenStream(cfg.data, split, cfg.vocab_size)) for split in ("train", "val"))
    except UserError as error:
        size = 2 * (wanted + EVALUATION_SET)
        line = f"data: none, random tokens instead; a run reads {wanted:,}, with the evaluation set {gigabytes(size)} of shards"
        return {"line": line, "missing_bytes": size, "problem": str(error)}
    line = f"data: {cfg.data}, {have:,} tokens to train on, of which a run reads {wanted:,}, and {val:,} to validate on"
    found = {"line": line, "missing_bytes": 0, "train_tokens": have, "val_tokens": val}
    if have >= ENOUGH * wanted:
        return found
    way_out = "prepare_fineweb.py without --limit_tokens, to another --out, makes more"
    problem = f"{cfg.data}: {have:,} tokens to train on, a run reads {wanted:,} and would read some again; {way_out}"
    return found | {"missing_bytes": 2 * (wanted - have), "problem": problem}


def check_space(needs: Needs) -> Found:
    """What is free on the one disk of `needs` beside what is to come."""
    free, total = free_bytes(next(iter(needs))[0]), needs.total()
    coming = (
        ", ".join(f"{gigabytes(size)} of {what} in {folder}" for (folder, what), size in needs.items() if size) or "nothing"
    )
    found = {"line": f"disk: {gigabytes(free)} free, to come {coming}", "free_bytes": free, "needed_bytes": total}
    if free >= total:
        return found
    way_out = "make room, keep fewer (--keep_checkpoints) or choose another --out_dir or --data"
    return found | {"problem": f"too little space, {gigabytes(free)} are free and to come are {coming}; {way_out}"}
