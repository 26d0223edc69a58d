"""The perplexities of a run, into its own run at Weights & Biases: a table of them all, a summary value for each length."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.checkpoint import config_of, find_checkpoint
from core.config import Config
from core.errors import UserError
from core.files import locked
from core.run import LOCK_PATIENCE_S, read_log
from core.trackers import WANDB_ID, start_wandb

COLUMNS = (
    "length", "perplexity", "stderr", "tokens", "step", "stride", "max_tokens", "min_document_tokens", "rope_scaling", "scale",
    "dtype", "data",
)  # fmt: skip


def tracked(path: str | Path) -> tuple[Path, Config]:
    """The run folder of the run or checkpoint at `path`, and its configuration. Raises UserError where wandb knows none."""
    checkpoint, state = find_checkpoint(path)
    folder, cfg = checkpoint.absolute().parent.parent, config_of(checkpoint, state)
    if cfg.wandb == "disabled" or not (folder / WANDB_ID).exists():
        raise UserError(f"--wandb: {path} was trained without wandb, which has no run to put its perplexities into")
    if find_spec("wandb") is None:
        raise UserError("--wandb: `pip install wandb`")
    return folder, cfg


def upload(path: str | Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Put `results`, those of eval_ppl.evaluate_run for the run or checkpoint at `path`, in place of earlier ones.

    They go into the summary and not into the history, which is the training's alone. Raises UserError where wandb cannot be
    had, and where another process, as one that trains, is at work in the run folder.
    """
    folder, cfg = tracked(path)
    with locked(folder, LOCK_PATIENCE_S):
        run = start_wandb(cfg, folder)
        import wandb

        summary: dict[str, Any] = {}
        if cfg.wandb == "offline":  # `wandb sync` lets the summary of the last start replace all: say again what training said
            for record in read_log((folder / "log.jsonl").read_bytes()):
                summary |= {key: value for key, value in record.items() if value is not None}
        summary |= {summary_key(r): r["perplexity"] for r in results if r["perplexity"] is not None}
        run.summary.update(summary)
        run.summary["perplexity"] = wandb.Table(columns=list(COLUMNS), data=[[r[key] for key in COLUMNS] for r in results])
        run.finish()


def summary_key(result: Mapping[str, Any]) -> str:
    """perplexity/1024; where it is special, as in perplexity/1024/yarn4/stride256/documents512, by that too."""
    return "/".join(["perplexity", str(result["length"]), *(words.replace(" ", "") for words in result["special"])])
