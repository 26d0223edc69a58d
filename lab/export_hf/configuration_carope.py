"""What `transformers` keeps of a model with any positional encoding, in config.json.

`gpt` holds the options that the model is built from, with the names of this repository's core/config.py.
"""

from typing import Any

from transformers import PretrainedConfig


class CARoPEConfig(PretrainedConfig):
    """The options of the model under `gpt`, and the sizes again under the names that transformers asks for."""

    model_type = "carope"

    def __init__(self, gpt: dict[str, Any] | None = None, use_cache: bool = True, **kwargs: Any) -> None:
        self.gpt, self.use_cache = gpt or {}, use_cache
        if gpt:
            kwargs |= {
                "vocab_size": gpt["vocab_size"],
                "hidden_size": gpt["n_embd"],
                "num_hidden_layers": gpt["n_layer"],
                "num_attention_heads": gpt["n_head"],
                "max_position_embeddings": gpt["block_size"],
            }
        super().__init__(**kwargs)
