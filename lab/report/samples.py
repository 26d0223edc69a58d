"""Samples for the report: what a run writes on from a prompt, by the settings that sample.py has as its own."""

from collections.abc import Sequence

import torch

from core.checkpoint import load_model
from core.distributed import Distributed
from core.errors import UserError
from core.kernels.packed import pack
from lab.report.data import RunRecord
from model import GPT
from sample import Sample
from text.tokenizer import Tokenizer, load_tokenizer

TOKENS, TEMPERATURE = 200, 0.8


def add_samples(record: RunRecord, prompts: Sequence[str], number: int, dist: Distributed) -> None:
    """Put `number` samples for each prompt into the record, seeds from 1 on; a note where there can be none."""
    try:
        if not (record.folder / "checkpoints").is_dir():
            raise UserError("no checkpoint")
        model, state, _ = load_model(record.folder)
        tokenizer = load_tokenizer(state.tokenizer)
        if tokenizer.n_vocab > model.cfg.vocab_size:
            raise UserError(f"its {model.cfg.vocab_size} ids are fewer than the {tokenizer.n_vocab} of {tokenizer.name!r}")
        pack(model.to(dist.device), dist.dtype)
        for prompt in prompts:
            for seed in range(1, number + 1):
                record.samples.append((prompt, *continuation(model, tokenizer, prompt, seed, dist)))
    except UserError as error:
        record.notes.append(f"no sample: {error}")


def continuation(model: GPT, tokenizer: Tokenizer, prompt: str, seed: int, dist: Distributed) -> tuple[str, str]:
    """At most TOKENS tokens of text after `prompt`, up to the end of the document, and a remark where positions ended early."""
    ids = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    if model.max_len is not None and len(ids) > model.max_len:
        raise UserError(f"prompt of {len(ids) - 1} tokens: the encoding has positions for {model.max_len} only")
    sample, text = Sample(tokenizer), ""
    idx_BT = torch.tensor([ids], device=dist.device)
    generators = [torch.Generator(dist.device).manual_seed(seed)]
    with dist.autocast():
        for next_B in model.generate(idx_BT, TOKENS, tokenizer.n_vocab, TEMPERATURE, None, 1.0, generators):
            text += sample.add(int(next_B))
            if sample.ended:
                break
    early = sample.n_tokens < TOKENS and not sample.ended
    return text + sample.rest(), f"no positions beyond {model.max_len} tokens" if early else ""
