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

from core.cache import KVCache
from lab.export_hf.configuration_carope import CARoPEConfig
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

    def crop(self, *_: Any) -> None:
        """Raise ValueError: of a running sum only the last value is kept, so no token can be taken back."""
        raise ValueError("assisted decoding takes tokens back, which this cache cannot; leave out its options")

    activate_past_recording = crop  # how it begins in transformers 5


class CARoPEForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT of model.py; its parameters are named `transformer.…`, and the head is the embedding matrix."""

    config_class = CARoPEConfig
    base_model_prefix = "transformer"
    # An encoding computes in fp32 whatever the type of the rest, as in training
    _keep_in_fp32_modules_strict = ("wpe",)  # type: ignore[assignment]
    _no_split_modules = ("GPT",)  # type: ignore[assignment]  # parts of it read others' weights
    supports_gradient_checkpointing = True

    def __init__(self, config: CARoPEConfig) -> None:
        super().__init__(config)
        self.transformer = GPT(SimpleNamespace(**config.gpt))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: GPT sets its weights itself, by its own table."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`half`, `bfloat16` or `to` of everything but the encodings: at a rounded f, phases go wrong with each token."""
        kept = [(p, p.detach()) for encoding in self.transformer.encodings for p in encoding.parameters()]
        super()._apply(fn, recurse)
        for p, whole in kept:
            if p.dtype.itemsize < whole.dtype.itemsize:
                p.data = whole.to(p.device)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.transformer.wte = value  # the head, too

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; the options that the model is built from follow."""
        found = super().resize_token_embeddings(*args, **kwargs)
        self.config.gpt["vocab_size"] = self.transformer.cfg.vocab_size = self.transformer.wte.num_embeddings
        return found

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.transformer.cfg.activation_checkpointing

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Keep only each block's input for the backward pass. Raises ValueError for torch's re-entrant way of it."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant: this model checkpoints without; leave it out")
        self.transformer.cfg.activation_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.transformer.cfg.activation_checkpointing = False

    # Divides the loss by num_items_in_batch itself, so that Trainer does not multiply it by its accumulation steps
    accepts_loss_kwargs = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, V), of the last `logits_to_keep` positions where that is not 0, or of those it lists; with `labels`,
        (B, T), the loss of the next tokens, whose sum is divided by `num_items_in_batch` or by their number; −100 is no target.

        A cache that is passed in, `Past`, is used and extended; `use_cache` makes a new one (default: config.use_cache, and not
        while training). Hidden states are the embeddings, each block's output, and in the last one's place the last norm's.
        Raises ValueError for what cannot be done: a mask that hides a token before others or has more than two dimensions,
        positions that are not counted from the first token on, embeddings in place of ids, attention weights, another cache.
        """
        refuse(inputs_embeds=inputs_embeds, output_attentions=output_attentions or None)
        if input_ids is None:
            raise ValueError("input_ids: missing")
        if any(p.is_meta for p in self.transformer.parameters()):
            raise ValueError(
                "device_map: offloads a part of this model, and others read its weights; put all of it on one device"
            )
        check_mask(attention_mask)
        past = past_of(past_key_values)
        if past is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            past = Past()
        start, T = len(past.cache) if past else 0, input_ids.size(1)
        check_positions(position_ids, start, T, attention_mask)
        check_positions(cache_position, start, T, None)
        with HiddenStates(self.transformer, output_hidden_states or False) as hidden:
            last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None and not output_hidden_states
            logits = self.transformer(input_ids, cache=past.cache if past else None, last_only=last_only)
        loss = None
        if labels is not None:
            total = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            loss = total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past, hidden_states=hidden.states)  # type: ignore[arg-type]
        return found if return_dict is not False else found.to_tuple()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        """Our cache for `generate`, in place of transformers' own."""
        refuse(cache_implementation=generation_config.cache_implementation)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = Past()


class HiddenStates:
    """While entered, takes what passes between the blocks of `model`: `states`, each (B, T, C), or None if not `asked` for."""

    def __init__(self, model: GPT, asked: bool) -> None:
        self.states: tuple[Tensor, ...] | None = () if asked else None
        self._places = [*model.h, model.ln_f] if asked else []

    def __enter__(self) -> "HiddenStates":
        def before(_module: nn.Module, args: tuple) -> None:
            self.states = (*(self.states or ()), args[0])

        def after(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            self.states = (*(self.states or ())[:-1], output)

        self._hooks = [place.register_forward_pre_hook(before) for place in self._places]
        self._hooks += [place.register_forward_hook(after) for place in self._places[-1:]]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def refuse(**given: Any) -> None:
    """Raise ValueError for the first argument that is not None: this model has no use for it."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: not supported by this model; leave it out")


def past_of(given: Any) -> Past | None:
    """Our cache, where one is given. Raises ValueError for another."""
    if given is not None and not isinstance(given, Past):
        raise ValueError(f"past_key_values: a {type(given).__name__} has no room for coordinates; use_cache=True makes a cache")
    return given


def check_positions(ids: Tensor | None, start: int, T: int, mask_BS: Tensor | None) -> None:
    """Raise ValueError where positions, (T,) or (B, T), are not start … start+T−1 for the tokens that `mask_BS` shows."""
    if ids is None:
        return
    wrong = ids != torch.arange(start, start + T, device=ids.device)
    if mask_BS is not None and ids.dim() == 2:
        wrong = wrong & mask_BS[:, -T:].bool()
    if wrong.any():
        raise ValueError("position_ids: this model counts positions from the first token on, without gaps; leave them out")


def check_mask(mask_BS: Tensor | None) -> None:
    """Raise ValueError where a token that `mask_BS` hides stands before one that it shows; padding on the right is harmless."""
    if mask_BS is not None and mask_BS.dim() != 2:
        raise ValueError(
            f"attention_mask: has {mask_BS.dim()} dimensions; this model takes (batch, tokens), 1 for a token that is there"
        )
    if mask_BS is not None and torch.any(mask_BS[:, 1:] > mask_BS[:, :-1]):
        raise ValueError(
            "attention_mask: padding on the left moves every position of these encodings; generate for texts of one length, "
            "or for one at a time (batch size 1), and pad on the right elsewhere"
        )
