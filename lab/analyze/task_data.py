"""Examples of four synthetic tasks, as text of single characters: each a pure function of (task, seed, split, index, length).

    copy       vqzk|vqzk                           the letters once more after the bar
    induction  KxRaKxTqTqKx?Ra                     what followed the capital in question, which occurs once before
    passkey    The grass #40713.is green. #40713   the digits after the first #, anywhere in a filler
    counting   ab*ba**ab?3                         how many stars there were, 0 to 9

Every token is one ASCII character: in the byte vocabulary its byte, in GPT-2's the token of that byte, whose ids begin with all
256 of them. So the text is the same in both; for a model with GPT-2's, it is an unusual spelling. The end-of-text token comes
first, the answer last.

Training reads rows of block_size tokens from the beginning of the stream on. Shards here are made of blocks of just that
length, each of whole examples; so every row begins with an end-of-text token and no example is cut.

Shapes: T tokens of an example.
"""

import platform
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from core.console import no_bar
from core.errors import UserError
from core.files import locked, write_json
from text.shard_writer import ShardWriter
from text.shards import MANIFEST, SHARD_SUFFIXES
from text.tokenizer import GPT2, Bytes

SHORTEST, LONGEST = 16, 2**24  # tokens; every task has room in the former
KEY = 5  # digits of a pass key
OTHERS = 8  # pairs of induction besides the one that is asked
VOCABULARIES = {one.name: one for one in (Bytes, GPT2)}
SPLITS = ("train", "val", "eval")  # no two share an example's random numbers
LOWER, UPPER, DIGITS = (np.arange(ord(first), ord(last) + 1, dtype=np.uint8) for first, last in ("az", "AZ", "09"))
SHARD_TOKENS = 100_000_000
VAL_SHARE = 20  # one in so many tokens, and at most
VAL_TOKENS = 1_000_000
MOST_TOKENS = 2**40
# Mohtashami and Jaggi's (2305.16300, section 4.2)
FILLER = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Drawn(NamedTuple):
    """An example without its end-of-text token, whose last `answers` characters are asked for.

    `depth` is the place where they can be found, if there is one: from 0, the beginning, to 1, right before the question.
    """

    text: bytes
    answers: int
    depth: float | None = None


class Task(NamedTuple):
    """How an example of `length` tokens is drawn, and the characters that an answer can be, all equally likely."""

    draw: Callable[[Generator, int], Drawn]
    choices: np.ndarray


class Example(NamedTuple):
    """Token ids (T,) uint16, of which the last `answers` are to be predicted, and the depth at which they can be found."""

    tokens: np.ndarray
    answers: int
    depth: float | None


def copy(rng: Generator, length: int) -> Drawn:
    """As many random letters as fit, a bar (two where the length is odd), the letters again."""
    n = length // 2 - 1
    half = rng.choice(LOWER, n).tobytes()
    return Drawn(half + b"|" * (length - 1 - 2 * n) + half, n)


def induction(rng: Generator, length: int) -> Drawn:
    """Pairs of a capital and the small letter that is its own here, in random order, one of them once; its capital is asked.

    The others come again and again, which is what there is to learn from on the way.
    """
    n = length // 2 - 2
    pairs = np.stack((rng.choice(UPPER, 1 + OTHERS, replace=False), rng.choice(LOWER, 1 + OTHERS)), axis=1)
    which, at = rng.integers(1, 1 + OTHERS, size=n), int(rng.integers(n))
    which[at] = 0
    return Drawn(pairs[which].tobytes() + b"?" * (length - 3 - 2 * n) + pairs[0].tobytes(), 1, at / (n - 1))


def passkey(rng: Generator, length: int) -> Drawn:
    """A key of digits at a random place of a text that goes round, asked for at the end; the text begins anywhere."""
    key = rng.choice(DIGITS, KEY).tobytes()
    room = length - len(b"e#.#") - 2 * KEY
    at, phase = int(rng.integers(room, endpoint=True)), int(rng.integers(len(FILLER)))
    filler = (FILLER * (room // len(FILLER) + 2))[phase : phase + room]
    return Drawn(filler[:at] + b"#" + key + b"." + filler[at:] + b"#" + key, KEY, at / room)


def counting(rng: Generator, length: int) -> Drawn:
    """Zero to nine stars at random places among a and b, and their number."""
    body, count = rng.choice(LOWER[:2], length - 3), int(rng.integers(10))
    body[rng.choice(len(body), count, replace=False)] = ord("*")
    return Drawn(body.tobytes() + b"?%d" % count, 1)


TASKS = {
    "copy": Task(copy, LOWER),
    "induction": Task(induction, LOWER),
    "passkey": Task(passkey, DIGITS),
    "counting": Task(counting, DIGITS),
}


def ids_of(text: bytes, tokenizer: str) -> np.ndarray:
    """ASCII characters as token ids, (len(text),) uint16, a token each.

    GPT-2 numbers the printable bytes from 0 on and the others from 188 on.
    """
    byte = np.frombuffer(text, np.uint8).astype(np.uint16)
    return byte if tokenizer == Bytes.name else np.where(byte > ord(" "), byte - ord("!"), byte + 188)


def example(task: str, seed: int, split: str, index: int, length: int, tokenizer: str) -> Example:
    """Number `index` of a split's examples of `length` tokens, SHORTEST at least."""
    drawn = TASKS[task].draw(generator(task, seed, split, index, length), length)
    ids = ids_of(drawn.text, tokenizer)
    return Example(np.insert(ids, 0, VOCABULARIES[tokenizer].eot).astype(np.uint16), drawn.answers, drawn.depth)


def block(tasks: list[str], seed: int, split: str, index: int, length: int, tokenizer: str) -> list[np.ndarray]:
    """Examples of any of `tasks` that together have `length` tokens: what training reads as one window.

    Half of the blocks are one example; in the others lengths are log-uniform, so that short ones, easier to learn, are many.
    """
    rng = generator("block", seed, split, index, length)
    sizes: list[int] = []
    left = length
    while left >= 2 * SHORTEST and (sizes or rng.random() < 0.5):
        size = int(SHORTEST * (left / SHORTEST) ** rng.random())
        if left - size < SHORTEST:
            break
        sizes.append(size)
        left -= size
    names = [tasks[i] for i in rng.integers(len(tasks), size=len(sizes) + 1)]
    numbers = range(index * (length // SHORTEST), (index + 1) * (length // SHORTEST))
    drawn = zip(names, [*sizes, left], numbers, strict=False)
    return [example(name, seed, split, number, size, tokenizer).tokens for name, size, number in drawn]


def generator(purpose: str, seed: int, split: str, index: int, length: int) -> Generator:
    """The random numbers of one example, independent of all others."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), seed, SPLITS.index(split), index, length])


def write_shards(folder: Path, tasks: Sequence[str], length: int, tokens: int, seed: int, tokenizer: str) -> dict[str, Any]:
    """Write about `tokens` training tokens, a twentieth as many of validation, and the manifest, which it returns.

    Raises UserError for an impossible length, fewer tokens than one block, or a folder with shards in it.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"--length = {length}: must be at least {SHORTEST}, for a task to have room, and at most {LONGEST}")
    if not length <= tokens <= MOST_TOKENS:
        raise UserError(f"--tokens = {tokens}: must be at least one window, --length = {length}, and at most {MOST_TOKENS}")
    with locked(folder):
        if any(path.suffix in SHARD_SUFFIXES for path in folder.iterdir()):
            raise UserError(f"{folder}: holds shards already; choose another folder, or delete it")
        n_blocks = {"val": max(1, min(tokens // VAL_SHARE, VAL_TOKENS) // length), "train": tokens // length}
        shards: list[dict[str, Any]] = []
        for split, total in n_blocks.items():
            at_once = max(1, SHARD_TOKENS // length)
            for first in range(0, total, at_once):
                path = folder / f"{split}_{len(shards):06d}.bin"
                numbers = range(first, min(total, first + at_once))
                shards.append(write_one(path, list(tasks), length, numbers, seed, split, tokenizer))
        manifest = {
            "source": ["tasks"], "tasks": list(tasks), "length": length, "seed": seed, "tokenizer": tokenizer,
            "n_vocab": VOCABULARIES[tokenizer].n_vocab, "eot": VOCABULARIES[tokenizer].eot,
            "tokens": sum(shard["tokens"] for shard in shards), "documents": sum(shard["documents"] for shard in shards),
            "shards": shards, "versions": {"python": platform.python_version(), "numpy": np.__version__},
        }  # fmt: skip
        write_json(folder / MANIFEST, manifest)
    return manifest


def write_one(
    path: Path, tasks: list[str], length: int, numbers: range, seed: int, split: str, tokenizer: str
) -> dict[str, Any]:
    """Write the blocks `numbers` of a split as one shard, whole or not at all; returns its entry in the manifest."""
    shard, documents = ShardWriter(path, len(numbers) * length), 0
    try:
        for index in tqdm(numbers, desc=path.name, unit="window", leave=False, disable=no_bar()):
            for tokens in block(tasks, seed, split, index, length, tokenizer):
                documents += 1
                shard.write(tokens)
        sha256 = shard.close()
    except BaseException:
        shard.abort()
        raise
    return {"file": path.name, "split": split, "tokens": shard.n_tokens, "documents": documents, "sha256": sha256}
