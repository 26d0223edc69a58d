"""The documents of an evaluation set, the loss of each, and the file that keeps these losses.

A shard has `<|endoftext|>` before each document. Document k opens with that token, at index s_k of the stream; its targets are
the tokens s_k+1 … s_(k+1): its own, and the end-of-text that ends it. The last one's end with the stream. Of a stream that
does not begin with end-of-text the first piece is a document too, that opens at index 0. So the targets of all documents are
those of the stream, each once. End-of-text has no bytes.

`eval_ppl.py --losses FILE.npz` writes the file, `Losses` is what is in it: `load` reads it, `merge` joins several.

    runs     (R,) str            names of the runs
    lengths  (L,) int64          window lengths, ascending
    loss     (R, L, D) float64   nats, the sum over a document's counted targets; NaN for all documents where the run has no
                                 positions for that length, or after a merge was not evaluated at it
    first    (D,) int64          index of the document's opening token in the stream, ascending
    tokens   (D,) int64          counted targets
    bytes    (D,) int64          of the counted text; all −1 where the tokenizer's are not known
    about    JSON                `About`: the data and the options, one for all, and lists with an entry for each run

D documents of which a target counts. npz as numpy writes it, without pickles; the same content gives the same bytes.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from core.data import TokenStream
from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.numerics import widest
from text.shards import first_error
from text.tokenizer import byte_lengths, eot_of

BLOCK = 1 << 22  # tokens looked through at a time


@dataclass(frozen=True)
class Documents:
    """The documents that are evaluated, in the order of the stream: opening token, counted targets, and bytes if known.

    With `min_tokens` each is evaluated by itself, and those with fewer targets are left out.
    """

    first_D: np.ndarray
    tokens_D: np.ndarray
    bytes_D: np.ndarray | None
    min_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.first_D)

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What `Windows` takes: the documents where each is evaluated by itself, else None."""
        return None if self.min_tokens is None else (self.first_D, self.tokens_D)

    @property
    def n_bytes(self) -> int | None:
        """Bytes of all counted text; None where they are not known."""
        return None if self.bytes_D is None else int(self.bytes_D.sum())


def find_documents(stream: TokenStream, max_tokens: int = 0, min_tokens: int | None = None) -> Documents:
    """The documents of the first `max_tokens` targets (0: of all), the last one cut there.

    With `min_tokens` the first documents of so many targets or more, each whole: as many as have `max_tokens` together, at
    least one. Raises UserError where there is none, or where the end-of-text token is not known.
    """
    end = len(stream) - 1
    if min_tokens is None:
        end = min(end, max_tokens or end)
    first_D = _openings(stream, end)
    tokens_D = np.diff(first_D, append=end)
    if min_tokens is not None:
        long_D = tokens_D >= min_tokens
        if not long_D.any():
            raise UserError(
                f"--documents = {min_tokens}: the longest of the {len(first_D):,} documents in {stream.folder} has "
                f"{tokens_D.max()} tokens; that is the most that can be asked for"
            )
        first_D, tokens_D = first_D[long_D], tokens_D[long_D]
        fitting = int(np.searchsorted(tokens_D.cumsum(), max_tokens, side="right")) if max_tokens else len(first_D)
        first_D, tokens_D = first_D[: max(1, fitting)], tokens_D[: max(1, fitting)]
    return Documents(first_D, tokens_D, _bytes(stream, first_D, tokens_D), min_tokens)


def end_of_text(stream: TokenStream) -> int | None:
    """Id of the token before every document; None where neither the tokenizer's name nor the manifest tells."""
    return eot_of(stream.tokenizer, stream.manifest)


def _openings(stream: TokenStream, end: int) -> np.ndarray:
    """Indices of the tokens before `end` that open a document, (D,) int64; 0 is the first."""
    eot = end_of_text(stream)
    if eot is None:
        raise UserError(
            f"{stream.folder}: which token of {stream.tokenizer!r} ends a text is not known, so documents are not to be told "
            'apart; "eot" in its manifest.json says it'
        )
    found = [np.zeros(1, dtype=np.int64)]
    for start in range(0, end, BLOCK):
        found.append(start + np.flatnonzero(stream.read(start, min(BLOCK, end - start)) == eot))
    opening_D = np.concatenate(found)
    return opening_D[1:] if len(opening_D) > 1 and opening_D[1] == 0 else opening_D


def _bytes(stream: TokenStream, first_D: np.ndarray, tokens_D: np.ndarray) -> np.ndarray | None:
    """Bytes of each document's targets, (D,) int64; None where the tokenizer, or one of the ids, is not known."""
    bytes_V = byte_lengths(stream.tokenizer)
    if bytes_V is None:
        return None
    at_N = np.stack((first_D, first_D + tokens_D), axis=1).ravel()  # ascending: documents do not overlap
    through_N = np.empty_like(at_N)  # bytes of the stream up to each of them, itself included
    total = 0
    for start in range(0, int(at_N[-1]) + 1, BLOCK):
        ids = stream.read(start, min(BLOCK, int(at_N[-1]) + 1 - start))
        if ids.max() >= len(bytes_V):
            return None
        sums = total + bytes_V[ids].cumsum()
        low, high = np.searchsorted(at_N, (start, start + len(ids)))
        through_N[low:high] = sums[at_N[low:high] - start]
        total = int(sums[-1])
    return through_N[1::2] - through_N[::2]


class LossSums:
    """The sum of each document's losses, (D,) `widest`, as an evaluation goes through its windows."""

    def __init__(self, documents: Documents, device: torch.device) -> None:
        self.documents = documents
        self.first_D = torch.from_numpy(documents.first_D).to(device)
        self.tokens_D = torch.from_numpy(documents.tokens_D).to(device, widest(device))
        self.sums_D = torch.zeros_like(self.tokens_D)

    def add(self, nll_BT: Tensor, start_B: Tensor) -> None:
        """Take in the losses, 0 where they do not count, of windows that begin with the tokens `start_B`, none before the
        first document."""
        target_BT = start_B[:, None] + torch.arange(1, nll_BT.size(1) + 1, device=start_B.device)
        document_BT = torch.searchsorted(self.first_D, target_BT) - 1
        self.sums_D.index_add_(0, document_BT.flatten(), nll_BT.flatten())


class About(BaseModel):
    """What decided the losses: the data, the options, and of each run the evaluated step, weights and number format."""

    model_config = ConfigDict(frozen=True, strict=True)

    tokenizer: str
    sha256: list[str]  # of the validation shards, in their order
    min_document_tokens: int | None  # null: the documents were read one after the other
    stride: int | None  # null: each length's own
    max_tokens: int  # 0: no limit
    step: list[int]
    weights: list[str]  # sha256
    dtype: list[str]
    rope_scaling: list[str | None]
    scale: list[float | None]

    def runs(self) -> list[tuple]:
        """What is told of each run."""
        return list(zip(*(getattr(self, key) for key in PER_RUN), strict=True))


@dataclass(frozen=True)
class Losses:
    """The loss of every document under every run and length: what the file holds (above)."""

    runs: np.ndarray
    lengths: np.ndarray
    loss: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    about: About

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]], documents: Documents, tokenizer: str, stride: int) -> "Losses":
        """Room, NaN so far, for the losses of a run at the lengths of its `results`, which say the rest."""
        first = results[0]
        about = {**first, "sha256": first["data_sha256"], "tokenizer": tokenizer, "stride": stride or None}
        about |= {key: [first[key]] for key in PER_RUN}
        lengths = np.unique(np.array([r["length"] for r in results], dtype=np.int64))
        n_bytes = np.full(len(documents), -1) if documents.bytes_D is None else documents.bytes_D
        loss = np.full((1, len(lengths), len(documents)), np.nan)
        run = np.array([first["run"]])
        return cls(run, lengths, loss, documents.first_D, documents.tokens_D, n_bytes, About(**about))

    def put(self, length: int, sums_D: Tensor) -> None:
        """Set the losses of the (one) run at `length`."""
        self.loss[0, np.searchsorted(self.lengths, length)] = sums_D.cpu().double().numpy()

    def without(self, names: Collection[str]) -> "Losses | None":
        """What is there of other runs than those of these names; None where nothing is."""
        kept = [i for i, name in enumerate(self.runs.tolist()) if name not in names]
        if not kept:
            return None
        told = {key: [getattr(self.about, key)[i] for i in kept] for key in PER_RUN}
        return replace(self, runs=self.runs[kept], loss=self.loss[kept], about=self.about.model_copy(update=told))

    def save(self, path: Path) -> str:
        """Write the file, whole or not at all; returns its sha256."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, about=np.array(self.about.model_dump_json()), **arrays)
        return sha256_file(path)

    def check(self) -> None:
        """Raise ValueError, saying what is wrong, for what `save` would not have written."""
        R, L, D = self.runs.size, self.lengths.size, self.first.size
        for name, (kind, shape) in ARRAYS.items():
            array, wanted = getattr(self, name), tuple({"R": R, "L": L, "D": D}[axis] for axis in shape)
            if not array.dtype.str.startswith(kind) or array.shape != wanted or 0 in wanted:
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        if {len(value) for key, value in self.about if key in PER_RUN} != {R}:
            raise ValueError(f"about does not tell of {R} runs")
        if np.isinf(self.loss).any():
            raise ValueError("a loss is infinite")
        if min(self.lengths[0], self.tokens.min(), self.first[0] + 1) < 1 or not (
            self.bytes.min() >= 0 or (self.bytes == -1).all()
        ):
            raise ValueError("a count is below what can be")
        if (np.diff(self.lengths) < 1).any() or (np.diff(self.first) < self.tokens[:-1]).any():
            raise ValueError("lengths do not ascend, or documents overlap")


ARRAYS = {  # type, with its byte order, and shape
    "runs": ("<U", "R"), "lengths": ("<i8", "L"), "loss": ("<f8", "RLD"),
    "first": ("<i8", "D"), "tokens": ("<i8", "D"), "bytes": ("<i8", "D"),
}  # fmt: skip
PER_RUN = ("step", "weights", "dtype", "rope_scaling", "scale")  # lists in `About`


def load(path: str | Path) -> Losses:
    """The file at `path`. Raises UserError, naming it, for one that cannot be read or does not hold what it should."""
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            arrays = {name: found[name] for name in ARRAYS}
            losses = Losses(**arrays, about=About.model_validate_json(str(found["about"])))
        losses.check()
        return losses
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not a readable file of losses (about.{first_error(error)})") from None
    except Exception as error:  # zip, zlib and numpy each have their own
        raise UserError(f"{path}: not a readable file of losses ({error}); eval_ppl.py --losses writes it anew") from None


def refuse_other_documents(one: Losses, other: Losses) -> None:
    """Raise UserError, naming the first difference, where two are not losses of the same documents under the same options."""
    names = ("sha256", "tokenizer", "min_document_tokens", "stride")
    different = [name for name in names if getattr(one.about, name) != getattr(other.about, name)]
    different += [name for name in ("first", "tokens") if not np.array_equal(getattr(one, name), getattr(other, name))]
    if different:
        raise UserError(
            f"losses of {one.runs[0]} and {other.runs[0]}: not of the same documents ({different[0]} differs); evaluate them "
            "on the same data, with the same --documents, --stride and --max_tokens"
        )


def merge(several: Sequence[Losses]) -> Losses:
    """One of all runs and lengths. A run that is in several, by its name and all that `about` says of it, becomes one.

    Raises UserError where their documents are not the same, or where a run has been evaluated at a length twice.
    """
    lengths = np.unique(np.concatenate([one.lengths for one in several]))
    rows: dict[tuple, np.ndarray] = {}
    for one in several:
        refuse_other_documents(several[0], one)
        at = np.searchsorted(lengths, one.lengths)
        for key, loss_LD in zip(zip(one.runs.tolist(), one.about.runs(), strict=True), one.loss, strict=True):
            row = rows.setdefault(key, np.full((len(lengths), len(one.first)), np.nan))
            new = np.full_like(row, np.nan)
            new[at] = loss_LD
            if twice := lengths[~(np.isnan(row) | np.isnan(new)).all(1)].tolist():
                raise UserError(f"losses of {key[0]} at length {twice[0]} are there twice; leave one of them out")
            row[:] = np.where(np.isnan(new), row, new)
    per_run = dict(zip(PER_RUN, map(list, zip(*(told for _, told in rows), strict=True)), strict=True))
    first = max(several, key=lambda one: one.bytes.min())  # one that knows the bytes, where there is one
    about = first.about.model_copy(update=per_run)
    runs = np.array([run for run, _ in rows])
    return Losses(runs, lengths, np.stack([*rows.values()]), first.first, first.tokens, first.bytes, about)
