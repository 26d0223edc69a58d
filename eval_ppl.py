"""Perplexity of runs or checkpoints at several lengths, on the same tokens at every length.

    python eval_ppl.py runs/small-carope runs/small-rope --lengths 512 1024
    torchrun --standalone --nproc_per_node=2 eval_ppl.py runs/small-carope --json results.json
    python eval_ppl.py runs/small-rope --lengths 1024 2048 --rope_scaling yarn --scale 4
    python eval_ppl.py runs/small-carope --lengths 512 2048 8192 --stride 256 --figure position.png

Windows do not overlap: with length T, window w predicts tokens wT+1 … wT+T from the at most T tokens before each inside
the window, the last window is what is left. So every token of the evaluation set but the first is predicted exactly
once, whatever T is. Perplexity is exp of the mean of their negative log-likelihoods. With --stride S windows begin S tokens
after each other and only the last S tokens of each count, of the first all: the same tokens, each with more before it.

    python eval_ppl.py runs/small-carope runs/small-rope --lengths 512 2048 --documents 2048 --losses losses.npz

With --documents N every document of at least N tokens is evaluated by itself: its windows begin with the end-of-text token
that opens it, and no token is predicted from another document. Again all its tokens count, at every length. --losses keeps
the loss of each document, with or without --documents (the format: core/documents.py).
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from core.checkpoint import MODEL, State, load_model
from core.config import Config
from core.console import CommandLine, given_path, new_file
from core.data import TokenStream
from core.distributed import Distributed, format_name, pick_dtype
from core.documents import Documents, Losses, LossSums, end_of_text, find_documents, merge, refuse_other_documents
from core.errors import UserError, at_least, command
from core.evaluate import Evaluation, evaluate
from core.figures import draw_profiles
from core.files import write_json
from core.fingerprint import made_by, source_of, warn_of_other_code
from core.profile import Profile
from core.provenance import git_version
from core.results import Question, Result, beside, check_file, closing, read_results, render, special
from core.upload import tracked, upload
from model import GPT
from positional.scaling import SCALINGS, rescale


def parse_args() -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("runs", type=given_path, nargs="+", metavar="RUN", help="run folder (its newest valid checkpoint) or checkpoint folder")
    add("--lengths", nargs="+", type=int, default=[512, 1024], metavar="T", help="window lengths, tokens [default: 512 1024]")
    add(
        "--max_tokens",
        "--max-tokens",
        type=int,
        default=0,
        help="evaluate the first so many tokens only, or documents with so many together [default: all]",
    )
    add("--stride", type=int, default=0, metavar="S", help="tokens from one window to the next [default: its length]")
    add(
        "--documents",
        type=int,
        metavar="N",
        help="evaluate documents of at least N tokens, each by itself [default: all in one]",
    )
    add("--losses", type=new_file, metavar="FILE.npz", help="also write the loss of every document, under all runs and lengths")
    add("--per_position", "--per-position", action="store_true", help="loss against position in the window, into the JSON too")
    add("--figure", type=new_file, metavar="FILE.png", help="draw it; implies --per_position")
    add("--batch", type=int, default=0, help="windows per forward pass [default: what fits in about a gigabyte]")
    add("--data", type=given_path, help="folder of token shards [default: the one the run was trained on]")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="[default: auto, the first that is there]")
    add("--dtype", choices=["auto", "bfloat16", "float32"], help="autocast type [default: the one the run was trained in]")
    add(
        "--rope_scaling",
        "--rope-scaling",
        choices=["linear", "ntk", "dynamic", "yarn"],
        help="scale the phases of RoPE or CARoPE to windows beyond the training length, untrained [default: no scaling]",
    )
    add(
        "--scale",
        type=float,
        help="of --rope_scaling, at least 1: evaluation length over training length, the run's block_size",
    )
    add("--json", type=new_file, metavar="FILE", help="also write the results as a list of JSON objects")
    add("--append", action="store_true", help="with --json: keep the results of other evaluations that the file has")
    add(
        "--wandb",
        action="store_true",
        help="also put each run's results into its own run at Weights & Biases, online or offline as it was trained: "
        "the table `perplexity` and summary values as perplexity/512",
    )
    return parser.parse_args()


def evaluate_run(
    path: str | Path,
    lengths: Sequence[int],
    dist: Distributed,
    *,
    max_tokens: int = 0,
    batch: int = 0,
    data: str | None = None,
    dtype: str | None = None,
    rope_scaling: str | None = None,
    scale: float | None = None,
    stride: int = 0,
    per_position: bool = False,
    min_document_tokens: int | None = None,
    keep: list[Losses] | None = None,
) -> list[Result]:
    """One result per length for the run or checkpoint at `path`; nulls where its encoding has no positions.

    What is not given is as the run had it (`data`, `dtype`) or fits into memory (`batch`). With `rope_scaling`, a name in
    positional.scaling.SCALINGS, phases are scaled by `scale`. With `min_document_tokens` documents of so many tokens are
    evaluated, each by itself. `keep` gets the losses of all documents; those of other documents in it are refused.
    """
    model, state, folder = load_model(path)
    if dist.is_main:
        warn_of_other_code(folder, state, made_by(model.cfg))
    scale_phases(model, rope_scaling, scale)
    dist.dtype = pick_dtype(dtype or state.dtype or model.cfg.dtype, dist.device)
    model.to(dist.device)
    stream = TokenStream(data or model.cfg.data, "val", model.cfg.vocab_size)
    if stream.tokenizer != state.tokenizer:
        raise UserError(f"{stream.folder}: tokenized by {stream.tokenizer!r}, but {path} was trained on {state.tokenizer!r}")
    per_document = min_document_tokens is not None or keep is not None
    documents = (
        find_documents(stream, max_tokens, min_document_tokens) if per_document or end_of_text(stream) is not None else None
    )
    asked: dict[str, Any] = {
        "max_tokens": max_tokens, "min_document_tokens": min_document_tokens, "rope_scaling": rope_scaling, "scale": scale,
        "dtype": format_name(dist.dtype), "weights": state.sha256[MODEL],
        "data_sha256": stream.sha256(), "source": source_of(model.cfg.encoding),
    }  # fmt: skip
    questions = [Question(length=length, stride=stride or length, **asked) for length in lengths]
    results = [unanswered(question, model, state, folder, stream) for question in questions]
    if documents and keep is not None:
        keep.append(Losses.of(results, documents, stream.tokenizer, stride))
        refuse_other_documents(keep[0], keep[-1])
    for length, result in zip(lengths, results, strict=True):
        if model.max_len is None or length <= model.max_len:
            windows = batch or default_batch(length, model.cfg)
            profile = Profile(length, dist.device) if per_position else None
            sums = LossSums(documents, dist.device) if documents and per_document else None
            found = evaluate(
                model, stream, length, windows, dist, max_tokens, progress=dist.is_main, stride=stride, profile=profile,
                by_document=sums,
            )  # fmt: skip
            if not math.isfinite(found.nll):
                raise UserError(f"{folder}: its loss at length {length} is {found.nll}, {why_not_finite(model)}")
            result |= measured(found, documents) | ({"per_position": profile.summary()} if profile else {})
            if sums and keep is not None:
                keep[-1].put(length, sums.sums_D)
    return results


def unanswered(question: Question, model: GPT, state: State, folder: Path, stream: TokenStream) -> Result:
    """A result with nothing measured yet: what is asked of which checkpoint."""
    own = Question.standard(state, question.length, next(model.parameters()).device.type)
    return {
        "run": model.cfg.name, "encoding": model.cfg.encoding, "n_params": model.n_params()["total"],
        "block_size": model.cfg.block_size, "tokens": None, "nll": None, "perplexity": None, "stderr": None, "documents": None,
        "bytes": None, "bits_per_byte": None, "checkpoint": str(folder), "step": state.step, "steps": model.cfg.steps,
        "data": str(stream.folder), "git": git_version(), **asdict(question), "special": special(question, own),
        "probe": state.probe,
    }  # fmt: skip


def why_not_finite(model: nn.Module) -> str:
    """Why a model's loss is no number, in words."""
    bad = next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
    return f"as {bad} is not finite everywhere" if bad else "though its weights are finite; --dtype=float32 may help"


def measured(found: Evaluation, documents: Documents | None) -> Result:
    """The measured part of a result; null for what is not known."""
    perplexity, stderr = (x if math.isfinite(x) else None for x in (found.perplexity, found.stderr))  # of one window: unknown
    n_bytes = documents.n_bytes if documents else None
    return {
        "tokens": found.tokens, "nll": found.nll, "perplexity": perplexity, "stderr": stderr,
        "documents": len(documents) if documents else None, "bytes": n_bytes,
        "bits_per_byte": found.nll / math.log(2) * found.tokens / n_bytes if n_bytes else None,
    }  # fmt: skip


def scale_phases(model: GPT, rope_scaling: str | None, scale: float | None) -> None:
    """Set the scaling that is asked for, from the length that `model` was trained at. Raises UserError where it cannot be."""
    if (rope_scaling is None) != (scale is None):
        missing = "--scale" if scale is None else "--rope_scaling"
        raise UserError(
            f"{missing} is missing: --rope_scaling says how to scale phases and --scale by how much, e.g. yarn and 4"
        )
    if rope_scaling is not None and scale is not None:
        try:
            rescale(model.encodings, model.cfg.encoding, SCALINGS[rope_scaling](scale, model.cfg.block_size))
        except ValueError as error:
            raise UserError(f"--{error}") from None


def default_batch(length: int, cfg: Config) -> int:
    """Windows per forward pass that keep the fp32 logits, or with few ids what a block makes of them, near a gigabyte."""
    return max(1, 2**28 // (length * max(cfg.vocab_size, 16 * cfg.n_embd)))


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values that cannot be."""
    at_least(1, lengths=args.lengths, documents=args.documents)
    at_least(0, max_tokens=args.max_tokens, batch=args.batch, stride=args.stride)
    if args.append and not args.json:
        raise UserError("--append: goes with --json FILE, which it adds to")
    if args.append:
        check_file(Path(args.json))
    if args.stride > min(args.lengths):
        shortest = f"the shortest of --lengths = {min(args.lengths)}"
        raise UserError(f"--stride = {args.stride}: tokens between windows would not count; must be at most {shortest}")


@command
def main() -> None:
    """Evaluate the runs of the command line, print the table, write the files."""
    args = parse_args()
    check(args)
    for path in args.runs if args.wandb else []:
        tracked(path)
    there = read_results(Path(args.json)) if args.append else []
    with Distributed.start(args.device, args.dtype or "auto") as dist:
        results: list[Result] = []
        kept: list[Losses] = []
        for path in args.runs:
            options = {"max_tokens": args.max_tokens, "batch": args.batch, "data": args.data, "dtype": args.dtype}
            options |= {"rope_scaling": args.rope_scaling, "scale": args.scale}
            options |= {"stride": args.stride, "per_position": args.per_position or bool(args.figure)}
            options |= {"min_document_tokens": args.documents, "keep": kept if args.losses else None}
            results += evaluate_run(path, args.lengths, dist, **options)
            losses_of_all = merge(kept) if args.losses else None
            if dist.is_main:  # after each run: what is evaluated is kept, whatever happens to the next
                write(results, losses_of_all, args, there)
        if dist.is_main and args.figure:
            draw_profiles(results, Path(args.figure))
        if dist.is_main:
            print(render(results))
            print(closing(results, args.documents, dist.device.type))
        with dist.together():  # last: whatever happens to it, the results are there
            for i, path in enumerate(args.runs if args.wandb and dist.is_main else []):
                upload(path, results[i * len(args.lengths) :][: len(args.lengths)])


def write(results: list[Result], losses_of_all: Losses | None, args: argparse.Namespace, there: list[Result]) -> None:
    """Write the files that are asked for, the JSON with what was `there`; the results get to know the file of the losses."""
    if losses_of_all:
        sha256 = losses_of_all.save(Path(args.losses))
        for result in results:
            result["losses"] = {"file": args.losses, "sha256": sha256}
    if args.json:
        write_json(Path(args.json), beside(results, there))


if __name__ == "__main__":
    main()
