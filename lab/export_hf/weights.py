"""Our weights under the names, and in the layouts, of Hugging Face's GPT-2 and GPT-NeoX; their configurations.

GPT-2 keeps its linear layers transposed (Conv1D). GPT-NeoX puts the rows of q, k and v of one head side by side, where ours are
all of q, then all of k, then all of v. Shapes: C width, H heads, D = C/H head width.
"""

from typing import Any

from torch import Tensor

from core.config import Config

NEOX_NAMES = {
    "wte.": "gpt_neox.embed_in.", "ln_f.": "gpt_neox.final_layer_norm.", "h.": "gpt_neox.layers.", "ln_1.": "input_layernorm.",
    "ln_2.": "post_attention_layernorm.", "attn.c_attn.": "attention.query_key_value.", "attn.c_proj.": "attention.dense.",
    "mlp.c_fc.": "mlp.dense_h_to_4h.", "mlp.c_proj.": "mlp.dense_4h_to_h.",
}  # fmt: skip


def prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in GPT2LMHeadModel and CARoPEForCausalLM."""
    return {f"transformer.{name}": p for name, p in weights.items()}


def to_neox(weights: dict[str, Tensor], n_head: int) -> dict[str, Tensor]:
    """Weights of RoPE's model as GPTNeoXForCausalLM names and lays them out; llama.cpp wants the tied head, too."""
    found = {"embed_out.weight": weights["wte.weight"].clone()}
    for name, p in weights.items():
        if ".c_attn." in name:
            p = p.view(3, n_head, -1, *p.shape[1:]).transpose(0, 1).reshape(p.shape).contiguous()
        kind = name
        if name.startswith("h."):
            _, layer, kind = name.split(".", 2)
        renamed = next(theirs + kind.removeprefix(ours) for ours, theirs in NEOX_NAMES.items() if kind.startswith(ours))
        found[f"gpt_neox.layers.{layer}.{renamed}" if name.startswith("h.") else renamed] = p
    return found


def gpt2_config(cfg: Config, n_vocab: int) -> dict[str, Any]:
    """config.json of a model with learned positions."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": n_vocab, "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,  # by which llama.cpp knows it
        "n_embd": cfg.n_embd, "n_layer": cfg.n_layer, "n_head": cfg.n_head, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def neox_config(cfg: Any, n_vocab: int) -> dict[str, Any]:
    """config.json of a model with RoPE."""
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": n_vocab, "hidden_size": cfg.n_embd,
        "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head, "intermediate_size": 4 * cfg.n_embd,
        "hidden_act": "gelu_new", "max_position_embeddings": cfg.block_size, "rotary_pct": 1.0,
        "rotary_emb_base": cfg.rope_base, "rope_theta": cfg.rope_base, "layer_norm_eps": 1e-5,
        "use_parallel_residual": False, "attention_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip


# Of a run's configuration, what says where things are and not what was computed
LEFT_OUT = {"out_dir", "data", "wandb", "wandb_project", "tensorboard", "device", "init_from"}


def carope_config(cfg: Config, n_vocab: int) -> dict[str, Any]:
    """config.json of a model whose code lies beside it."""
    gpt = cfg.model_dump(exclude=LEFT_OUT) | {"vocab_size": n_vocab, "kernel": "eager", "activation_checkpointing": False}
    return {
        "architectures": ["CARoPEForCausalLM"], "model_type": "carope", "gpt": gpt,
        "auto_map": {
            "AutoConfig": "configuration_carope.CARoPEConfig",
            "AutoModelForCausalLM": "modeling_carope.CARoPEForCausalLM",
        },
    }  # fmt: skip
