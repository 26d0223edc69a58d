"""A run as a folder that `transformers` loads; it is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint import load_model, reason
from core.errors import UserError
from core.files import ROOT, fsync_folder
from core.initial import transposed
from lab.export_hf.bundle import bundle
from lab.export_hf.card import card, read_evaluations
from lab.export_hf.tokenizer import as_json, tokenizer_files
from lab.export_hf.weights import carope_config, gpt2_config, neox_config, prefixed, to_neox
from model import GPT
from text.tokenizer import load_tokenizer

ARCHITECTURES = {"learned": "GPT2LMHeadModel", "rope": "GPTNeoXForCausalLM"}  # that transformers has; else code of our own


def export(run: str | Path, out: str | Path) -> str:
    """Write the folder `out` from a run's newest checkpoint, or from a checkpoint; returns the architecture's name.

    Raises UserError where `out` is there and not empty, or where the run or its tokenizer cannot be exported.
    """
    check_free(Path(out))
    model, state, checkpoint = load_model(run)
    tokenizer = load_tokenizer(state.tokenizer)
    cfg, n_vocab = model.cfg, tokenizer.n_vocab
    if n_vocab > cfg.vocab_size:
        raise UserError(f"{run}: its {cfg.vocab_size} ids are fewer than the {n_vocab} of the tokenizer {tokenizer.name!r}")
    custom = cfg.encoding not in ARCHITECTURES
    code = bundle(cfg.encoding) if custom else {}
    config, weights = converted(model, n_vocab)
    config |= {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "tie_word_embeddings": True, "dtype": "float32"}
    evaluations = read_evaluations(checkpoint.parent.parent, state)
    files = tokenizer_files(tokenizer, model.max_len) | {
        "config.json": as_json(config),
        "generation_config.json": as_json({"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}),
        "README.md": card(model, state, evaluations, custom, n_vocab).encode(),
        "LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    files |= {name: text.encode() for name, text in code.items()}
    with whole_folder(Path(out)) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "model.safetensors").chmod((folder / "LICENSE").stat().st_mode)  # safetensors leaves it to its owner alone
    return ARCHITECTURES.get(cfg.encoding, "CARoPEForCausalLM")


def converted(model: GPT, n_vocab: int) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the weights. The padding of the vocabulary is cut off, so that nobody's `generate` can draw it."""
    weights = {name: p.contiguous() for name, p in model.state_dict().items()}
    weights["wte.weight"] = weights["wte.weight"][:n_vocab].clone()
    if model.cfg.encoding == "learned":
        return gpt2_config(model.cfg, n_vocab), prefixed(transposed(weights))
    if model.cfg.encoding == "rope":
        return neox_config(model.cfg, n_vocab), to_neox(weights, model.cfg.n_head)
    return carope_config(model.cfg, n_vocab), prefixed(weights)


def check_free(out: Path) -> None:
    """Raise UserError where `out` is anything but an empty folder or a name not taken yet."""
    try:
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out}: is there already; remove it or choose another folder")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary neighbor of `out` to write into; on success its files are fsynced and it takes the name, else it goes."""
    temporary = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        yield temporary
        readable = next(temporary.iterdir()).stat().st_mode & 0o666  # by the umask, which mkdtemp does not ask
        temporary.chmod(readable | (readable & 0o444) >> 2)
        for written in temporary.iterdir():
            with open(written, "rb+") as handle:
                os.fsync(handle.fileno())
        fsync_folder(temporary)
        temporary.rename(out.absolute())
        fsync_folder(out.absolute().parent)
    except OSError as error:
        raise UserError(f"{out}: not written ({reason(error)}); nothing of it is left") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
