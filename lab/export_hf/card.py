"""The model card of an export, from what the run says of itself."""

from pathlib import Path

from core.checkpoint import MODEL, State
from core.errors import printable
from core.provenance import git_version
from core.results import Result, read_results
from core.tables import table
from model import GPT
from text.tokenizer import EOT

SHOWN = ("encoding", "n_layer", "n_head", "n_embd", "block_size", "tokens_per_step", "steps", "lr", "seed")


def card(model: GPT, state: State, evaluations: list[Result], custom: bool, n_vocab: int) -> str:
    """README.md of the folder: what the model is, how to load it, what it was trained on, what it reaches."""
    cfg = model.cfg
    code = ", trust_remote_code=True" if custom else ""
    longest = f"It has positions for {model.max_len} tokens. " if model.max_len else ""
    n_params = model.n_params()["total"] - (cfg.vocab_size - n_vocab) * cfg.n_embd
    about = [
        *((key, getattr(cfg, key)) for key in SHOWN),
        ("tokens seen", f"{state.tokens:,}"),
        ("training data", f"`{printable(Path(cfg.data).name)}`, {state.train_tokens:,} tokens, tokenizer {state.tokenizer}"),
        ("commit of the training", state.git or "unknown"),
        ("commit of the export", git_version() or "unknown"),
    ]
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {printable(cfg.name)}

GPT-2 with the positional encoding `{cfg.encoding}`, {n_params:,} parameters, after step {state.step}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{code})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})
```

Every training document began with `{EOT}`, so a text should, too. {longest}The rows of the embedding that pad the
vocabulary are left out: {n_vocab} tokens remain, all of the tokenizer's.

## Training

{table(["", ""], about)}
## Perplexity

{perplexities(state, evaluations)}

## License

MIT for weights and code; what the training data asks for holds beside it.
"""


def perplexities(state: State, evaluations: list[Result]) -> str:
    """A table of the evaluations; without any, the last validation."""
    rows = [[one["length"], f"{one['perplexity']:.2f}", f"{one['tokens']:,}"] for one in evaluations]
    if rows:
        return table(["length", "perplexity", "tokens"], rows).rstrip()
    if state.val_loss is None:
        return "Not evaluated."
    return f"Validation loss during training: {state.val_loss:.4f} nats per token (step {state.val_step})."


def read_evaluations(run: Path, state: State) -> list[Result]:
    """The results in the run's eval.json that are of the checkpoint's weights and special in nothing but a limit of tokens."""
    found = [r for r in read_results(run / "eval.json") if r.get("weights") == state.sha256[MODEL] and r.get("perplexity")]
    return [r for r in found if all(words.startswith("first ") for words in r["special"])]
