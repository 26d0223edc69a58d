"""--init_from: weights to start from, of a Hugging Face folder or of a run, where there is no checkpoint to go on from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.checkpoint import MODEL, find_checkpoint
from core.console import remark
from core.errors import UserError
from core.fsdp import cut
from model import GPT

GPT2_NEEDS = {  # what our model computes; Hugging Face's default where config.json is silent
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
    "n_inner": (None, (None,)),
}
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # masks that old files of GPT-2 carry
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # GPT-2's Conv1D


@dataclass(frozen=True)
class Source:
    """Weights under our names, the encoding they were trained with, and the sizes that their shapes do not tell."""

    file: Path
    weights: dict[str, Tensor]
    encoding: str
    n_head: int


def transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear layers from (out, in) to (in, out), or back; the rest as it is."""
    return {name: p.T.contiguous() if name.endswith(TRANSPOSED) else p for name, p in weights.items()}


def load_initial(path: str, model: GPT, say: bool = False) -> None:
    """Load what `path` has into `model`, encodings only where they are the same; `say` on stderr what was taken and what not.

    A smaller vocabulary is padded, a longer table of learned positions is cut. Raises UserError where shapes differ otherwise.
    """
    found = read_source(Path(path))
    if found.n_head != model.cfg.n_head:
        heads = f"{found.file} has {found.n_head} heads, the model {model.cfg.n_head}"
        raise UserError(f"init_from: {heads}; --n_head={found.n_head} fits")
    own = model.state_dict()
    same = found.encoding == model.cfg.encoding
    weights = {name: p for name, p in found.weights.items() if same or not of_encoding(name)}
    fresh = {name for name in own if of_encoding(name) and not same}
    notes = fitted(weights, own, model)
    check_shapes(found.file, weights, {name: p for name, p in own.items() if name not in fresh})
    left = sorted(found.weights.keys() - weights.keys())
    if left:
        notes.append(f"{shown(left)} not taken: of encoding {found.encoding!r}")
    if fresh:
        notes.append(f"{shown(sorted(fresh))} as initialized: of encoding {model.cfg.encoding!r}")
    model.load_state_dict(own | {name: cut(p.to(own[name].dtype), own[name]) for name, p in weights.items()})
    if say:
        remark("; ".join([f"init_from: weights from {found.file}", *notes]))


def of_encoding(name: str) -> bool:
    """Whether a parameter belongs to a positional encoding."""
    return "wpe" in name.split(".")


def shown(names: list[str]) -> str:
    """A few of the names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fitted(weights: dict[str, Tensor], own: dict[str, Tensor], model: GPT) -> list[str]:
    """Pad the vocabulary and cut learned positions to the model's, in place; in words, what was done.

    Rows of the padding are the mean of the others: their logit is the mean logit, so that none of them takes more probability
    than the tokens do on average. Fresh rows would do harm: trained logits may all lie far below the 0 that those give.
    """
    notes = []
    wte, rows = weights.get("wte.weight"), len(own["wte.weight"])
    if wte is not None and len(wte) < rows:
        weights["wte.weight"] = torch.cat((wte, wte.float().mean(0, keepdim=True).to(wte.dtype).expand(rows - len(wte), -1)))
        notes.append(f"vocabulary padded from {len(wte)} to {rows} rows")
    wpe, length = weights.get("wpe.weight"), model.cfg.block_size
    if model.cfg.encoding == "learned" and wpe is not None and len(wpe) > length:
        weights["wpe.weight"] = wpe[:length]
        notes.append(f"the first {length} of {len(wpe)} positions")
    return notes


def check_shapes(file: Path, weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise UserError for the first tensor that is missing, unknown or of another shape."""
    for name in sorted(weights.keys() | own.keys()):
        here = list(weights[name].shape) if name in weights else "missing"
        there = list(own[name].shape) if name in own else "missing"
        if here != there:
            raise UserError(
                f"init_from: {name} is {here} in {file} and {there} in the model; n_layer, n_embd, vocab_size, block_size and "
                "the encoding's options must fit"
            )


def read_source(path: Path) -> Source:
    """The weights of a run, a checkpoint, or a folder with config.json and model.safetensors. Raises UserError."""
    if not (path / "config.json").is_file():
        try:
            folder, state = find_checkpoint(path)
        except UserError as error:
            raise UserError(f"init_from: {error} (or a Hugging Face folder: config.json and model.safetensors)") from None
        file, config = folder / MODEL, state.config
        return Source(file, read_weights(file), str(config.get("encoding")), int(config.get("n_head", 0)))
    config, file = read_config(path / "config.json"), path / MODEL
    kind = config.get("model_type")
    if kind not in ("gpt2", "carope"):
        raise UserError(
            f"init_from: {path / 'config.json'}: model_type = {kind!r}; only 'gpt2', 'carope' and our runs are read"
        )
    weights = {name.removeprefix("transformer."): p for name, p in read_weights(file).items()}
    if kind == "carope":
        gpt = config.get("gpt")
        gpt = gpt if isinstance(gpt, dict) else {}
        return Source(file, weights, str(gpt.get("encoding")), gpt.get("n_head", 0))
    check_gpt2(path / "config.json", config)
    weights = {name: p for name, p in weights.items() if not name.endswith(NOT_WEIGHTS) and name != "lm_head.weight"}
    return Source(file, transposed(weights), "learned", config.get("n_head", 12))


def read_config(file: Path) -> dict[str, Any]:
    """config.json. Raises UserError where it is no JSON object."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"init_from: {file}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"init_from: {file}: not the configuration of a model")
    return config


def check_gpt2(file: Path, config: dict[str, Any]) -> None:
    """Raise UserError where a GPT-2 computes something that our model does not."""
    for key, (default, taken) in GPT2_NEEDS.items():
        value = config.get(key, default)
        if value not in taken and not (key == "n_inner" and value == 4 * config.get("n_embd", 768)):
            raise UserError(f"init_from: {file}: {key} = {value!r}; the model here has {taken[0]!r}")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        why = "not there; weights in parts or in another format are not read" if not file.exists() else error
        raise UserError(f"init_from: {file}: {why}") from None
