"""GPT-2 with any positional encoding, as `transformers` wants a causal language model: generate(), a cache, a loss.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Shapes: B batch, T new positions, S cached and new positions, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from huggingface.configuration_carope import CARoPEConfig
from kernels.kv_cache import KVCache
from model import GPT


class Past:
    """Our cache under the names that `generate` calls: it holds coordinates, too, for which transformers' have no room."""

    is_compileable = False

    def __init__(self) -> None:
        self.cache = KVCache()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        return len(self.cache)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` of the batch, for beam search."""
        held = self.cache
        held.kv = {layer: (k[beam_idx], v[beam_idx]) for layer, (k, v) in held.kv.items()}
        held.coords = {layer: c if c.size(0) == 1 else c[beam_idx] for layer, c in held.coords.items()}


class CARoPEForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT of model.py; its parameters are named `transformer.…`, and the head is the embedding matrix."""

    config_class = CARoPEConfig
    base_model_prefix = "transformer"

    def __init__(self, config: CARoPEConfig) -> None:
        super().__init__(config)
        self.transformer = GPT(SimpleNamespace(**config.gpt))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: GPT sets its weights itself, by its own table."""

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), of the last `logits_to_keep` positions where that is not 0; with `labels`, (B, T), the mean loss of
        the next tokens; −100 is no target.

        Raises ValueError for a mask that hides a token before others: phases are counted from the first token on.
        """
        check_mask(attention_mask)
        past = past_of(past_key_values) if use_cache else None
        logits = self.transformer(input_ids, cache=past.cache if past else None, last_only=logits_to_keep == 1)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)  # type: ignore[arg-type]


def past_of(given: Any) -> Past:
    """Our cache: the `given` one, or a new one in place of an empty one that `generate` has prepared."""
    if isinstance(given, Past):
        return given
    if given is not None and given.get_seq_length() > 0:
        raise ValueError(f"past_key_values: a filled {type(given).__name__} has no coordinates; start from the whole text")
    return Past()


def check_mask(mask_BS: Tensor | None) -> None:
    """Raise ValueError where a token that `mask_BS` hides stands before one that it shows; padding on the right is harmless."""
    if mask_BS is not None and torch.any(mask_BS[:, 1:] > mask_BS[:, :-1]):
        raise ValueError(
            "attention_mask: padding on the left moves every position of these encodings; generate for texts of one length, "
            "or for one at a time (batch size 1), and pad on the right elsewhere"
        )
