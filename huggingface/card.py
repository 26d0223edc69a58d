"""The model card of an export, from what the run says of itself."""

import json
from pathlib import Path
from typing import Any

from model import GPT
from system.errors import printable
from training.checkpoint import State
from training.provenance import git_version

SHOWN = ("encoding", "n_layer", "n_head", "n_embd", "block_size", "tokens_per_step", "steps", "lr", "seed")


def card(model: GPT, state: State, evaluations: list[dict[str, Any]], custom: bool, n_vocab: int) -> str:
    """README.md of the folder: what the model is, how to load it, what it was trained on, what it reaches."""
    cfg = model.cfg
    code = ", trust_remote_code=True" if custom else ""
    longest = f"It has positions for {model.max_len} tokens. " if model.max_len else ""
    rows = "\n".join(f"| {key} | {getattr(cfg, key)} |" for key in SHOWN)
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {printable(cfg.name)}

GPT-2 with the positional encoding `{cfg.encoding}`, {model.n_params()["total"]:,} parameters, after step {state.step}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})
```

Every training document began with `{"<|endoftext|>"}`, so a text should, too. {longest}The rows of the embedding that pad the
vocabulary are left out: {n_vocab} tokens remain, all of the tokenizer's.

## Training

| | |
|---|---|
{rows}
| tokens seen | {state.tokens:,} |
| training data | `{printable(Path(cfg.data).name)}`, {state.train_tokens:,} tokens, tokenizer {state.tokenizer} |
| commit of the training | {state.git or "unknown"} |
| commit of the export | {git_version() or "unknown"} |

## Perplexity

{perplexities(state, evaluations)}

## License

MIT for weights and code; what the training data asks for holds beside it.
"""


def perplexities(state: State, evaluations: list[dict[str, Any]]) -> str:
    """A table of the evaluations of this checkpoint; without any, the last validation."""
    rows = [
        f"| {one['length']} | {one['perplexity']:.2f} | {one['tokens']:,} |" for one in evaluations if one["step"] == state.step
    ]
    if rows:
        return "\n".join(["| length | perplexity | tokens |", "|---:|---:|---:|", *rows])
    if state.val_loss is None:
        return "Not evaluated."
    return f"Validation loss during training: {state.val_loss:.4f} nats per token (step {state.val_step})."


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """What eval_ppl.py --json RUN/eval.json has left there: results with a perplexity and without scaled phases."""
    try:
        found = json.loads((run / "eval.json").read_text())
        return [one for one in found if one["perplexity"] is not None and not one.get("rope_scaling") and one["tokens"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
