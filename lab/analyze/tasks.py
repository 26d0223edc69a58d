"""Copying, induction, pass key and counting, at 1 to 16 times the training length; accuracy beside that of a guess.

    python -m lab.analyze tasks runs/small-rope runs/small-carope                               # as they are: zero-shot
    python -m lab.analyze tasks --write_shards data/tasks --length 512 --tokens 1000000000      # to train runs on the tasks

An answer is the likeliest among the characters that it can be, so that a guess is right once in as many; the loss, in nats, is
over these too. Answers of several characters are asked one by one, the earlier ones given. What an example looks like is said
in lab/analyze/task_data.py. Those written for training are none of those measured on. Standard errors are over examples.

Shapes: B examples, T tokens, A characters of an answer, K characters that each can be, C width.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.checkpoint import load_model
from core.console import new_folder
from core.distributed import Distributed, pick_dtype
from core.errors import UserError
from core.evaluate import pieces
from core.figures import BASELINE, line, log_ticks, panels, save
from core.tables import mean_and_error, plus_minus
from lab.analyze.task_data import SHORTEST, TASKS, VOCABULARIES, example, ids_of, write_shards
from model import GPT

OWN_DATA = True  # lab.analyze: no text is read, and no RUN is needed for --write_shards
BATCH_TOKENS = 2**14  # at a time
DEPTHS = 5  # bins of the place where an answer can be found
DEFAULTS: dict[str, Any] = {"length": 512, "tokens": 100_000_000, "tokenizer": "gpt2"}  # of --write_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options; lab.analyze has the others."""
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=f"[default: {' '.join(TASKS)}]")
    add("--factors", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="N", help="training lengths [default: 1 2 4 8 16]")
    add("--examples", type=int, default=256, metavar="N", help="of each task and length [default: 256]")
    add("--seed", type=int, default=1, help="of the examples [default: 1]")
    shards = parser.add_argument_group("instead of RUNs, examples to train on, as token shards")
    add = shards.add_argument
    add(
        "--write_shards",
        "--write-shards",
        type=new_folder,
        metavar="FOLDER",
        help="where they go: train.py --data=FOLDER --block_size=LENGTH",
    )
    add("--length", type=int, metavar="T", help=f"the training length, tokens [default: {DEFAULTS['length']}]")
    add("--tokens", type=int, metavar="N", help=f"to train on; a twentieth more are validation [default: {DEFAULTS['tokens']}]")
    add("--tokenizer", choices=list(VOCABULARIES), help=f"whose ids [default: {DEFAULTS['tokenizer']}]")


def check(args: argparse.Namespace) -> None:
    """Raise UserError where options are out of range or do not go together; name tasks and factors once each."""
    for flag, least, most, values in (("examples", 2, 2**20, [args.examples]), ("seed", 0, 2**63 - 1, [args.seed]),
                                      ("factors", 1, 2**10, args.factors)):  # fmt: skip
        if bad := [value for value in values if not least <= value <= most]:
            raise UserError(f"--{flag} = {bad[0]}: must be at least {least} and at most {most}")
    if args.write_shards and args.runs:
        raise UserError(f"--write_shards {args.write_shards}: takes no RUN; measure {args.runs[0]} by a command of its own")
    given = next((name for name in DEFAULTS if getattr(args, name) is not None), None)
    if given and not args.write_shards:
        raise UserError(f"--{given}: says what --write_shards writes; runs are measured at --factors of their training length")
    if not args.write_shards and not args.runs:
        raise UserError("no RUN: name runs to measure, or with --write_shards a folder for examples to train them on")
    args.tasks, args.factors = list(dict.fromkeys(args.tasks)), sorted(set(args.factors))


def run_without(args: argparse.Namespace) -> None:
    """Write the shards that `args`, which name no run, ask for."""
    check(args)
    terms = DEFAULTS | {name: value for name, value in vars(args).items() if name in DEFAULTS and value is not None}
    made = write_shards(Path(args.write_shards), args.tasks, seed=args.seed, **terms)
    print(f"{args.write_shards}: {made['tokens']:,} tokens of {made['documents']:,} examples of {', '.join(args.tasks)}")
    print(f"python train.py CONFIG.toml --data={args.write_shards} --block_size={terms['length']} trains on them")


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Measure each run, print tables, draw tasks.png into `out`; returns what stands in the JSON."""
    check(args)
    with Distributed.start(args.device, "auto") as dist:
        found = [measure_run(path, args, dist) for path in args.runs]
    draw(found, args.tasks, out / "tasks.png")
    print(render(found, args.tasks))
    return {"seed": args.seed, "runs": found}


def measure_run(path: str, args: argparse.Namespace, dist: Distributed) -> dict[str, Any]:
    """What is found about the run or checkpoint at `path`: a record per task and length."""
    model, state, folder = load_model(path)
    cfg, vocabulary = model.cfg, VOCABULARIES.get(state.tokenizer)
    if vocabulary is None or vocabulary.n_vocab > cfg.vocab_size:
        known = ", ".join(f"{one.name!r} ({one.n_vocab} ids)" for one in VOCABULARIES.values())
        raise UserError(f"{path}: the tasks are in {known}; it has {state.tokenizer!r} and vocab_size = {cfg.vocab_size}")
    if cfg.block_size * min(args.factors) < SHORTEST:
        raise UserError(
            f"{path}: {cfg.block_size} × {min(args.factors)} tokens are too short for the tasks; {SHORTEST} are needed"
        )
    model.to(dist.device)
    dist.dtype = pick_dtype(cfg.dtype, dist.device)
    results = []
    with dist.autocast():
        for task in args.tasks:
            for factor in args.factors:
                length = factor * cfg.block_size
                about = {"task": task, "factor": factor, "length": length, "chance": 1 / len(TASKS[task].choices)}
                results.append(about | measure(model, state.tokenizer, task, length, args.examples, args.seed))
    return {
        "run": cfg.name, "encoding": cfg.encoding, "step": state.step, "checkpoint": str(folder), "data": cfg.data,
        "block_size": cfg.block_size, "results": results,
    }  # fmt: skip


@torch.no_grad()
def measure(model: GPT, tokenizer: str, task: str, length: int, examples: int, seed: int) -> dict[str, Any]:
    """Accuracy and loss of a task in `examples` examples of `length` tokens; nulls where the encoding has no positions.

    `exact` is the share of examples with every character right, `by_depth` the accuracy by where the answer can be found.
    """
    missing = {"accuracy": None, "stderr": None, "exact": None, "nll": None, "nll_stderr": None, "n": 0}
    if model.max_len is not None and length - 1 > model.max_len:  # nothing is predicted from the last token
        return missing
    device = model.wte.weight.device
    drawn = [example(task, seed, "eval", i, length, tokenizer) for i in range(examples)]
    choices_K = torch.from_numpy(ids_of(TASKS[task].choices.tobytes(), tokenizer).astype("int64")).to(device)
    right, nll = [], []
    for first in range(0, examples, max(1, BATCH_TOKENS // length)):
        some = drawn[first : first + max(1, BATCH_TOKENS // length)]
        idx_BT = torch.stack([torch.from_numpy(one.tokens.astype("int64")) for one in some]).to(device)
        n_answers = some[0].answers
        logits_BAK = answer_logits(model, idx_BT[:, :-1], n_answers, choices_K)
        one_right_BA, one_nll_BA = grade(logits_BAK, idx_BT[:, -n_answers:], choices_K)
        right.append(one_right_BA)
        nll.append(one_nll_BA)
    right_BA, nll_BA = torch.cat(right).double(), torch.cat(nll)
    accuracy, stderr = mean_and_error(right_BA.mean(1).tolist())
    mean_nll, nll_stderr = mean_and_error(nll_BA.mean(1).tolist())
    found = {"accuracy": accuracy, "stderr": stderr, "exact": right_BA.prod(1).mean().item(), "nll": mean_nll, "n": examples}
    found |= {"nll_stderr": nll_stderr, "answers": n_answers}
    depths = [one.depth for one in drawn if one.depth is not None]
    return found | ({"by_depth": by_depth(right_BA.mean(1), depths)} if depths else {})


def answer_logits(model: GPT, idx_BT: Tensor, n_answers: int, choices_K: Tensor) -> Tensor:
    """Logits of `choices_K` at the last `n_answers` positions, (B, A, K) float32; no others are formed but one a piece."""
    hidden: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, x_BTC: Tensor) -> Tensor:
        hidden.append(x_BTC[:, -n_answers:])
        return x_BTC[:, -1:]

    handle = model.ln_f.register_forward_hook(keep)
    try:
        for part, cache in pieces(model, idx_BT):
            model(idx_BT[:, part], cache=cache)
    finally:
        handle.remove()
    x_BAC = torch.cat(hidden, dim=1)[:, -n_answers:]
    with torch.autocast(x_BAC.device.type, enabled=False):
        return functional.linear(x_BAC.float(), model.wte.weight[choices_K].float())


def grade(logits_BAK: Tensor, answers_BA: Tensor, choices_K: Tensor) -> tuple[Tensor, Tensor]:
    """If the likeliest choice is the answer, (B, A) bool, and its loss over the choices, nats, (B, A) float64, on CPU."""
    logits_BAK = logits_BAK.cpu().double()
    index_BA1 = (answers_BA[..., None] == choices_K).int().argmax(-1, keepdim=True).cpu()
    nll_BA = -logits_BAK.log_softmax(-1).gather(-1, index_BA1)[..., 0]
    return logits_BAK.argmax(-1) == index_BA1[..., 0], nll_BA


def by_depth(accuracy_B: Tensor, depths: list[float]) -> list[dict[str, Any]]:
    """Accuracy of the examples whose answer can be found in each fifth of the text, 0 being its beginning."""
    bin_B = (torch.tensor(depths) * DEPTHS).long().clamp(max=DEPTHS - 1)
    found = []
    for i in range(DEPTHS):
        mine = accuracy_B[bin_B == i].tolist()
        accuracy, stderr = mean_and_error(mine) if len(mine) else (None, None)
        found.append({"from": i / DEPTHS, "to": (i + 1) / DEPTHS, "accuracy": accuracy, "stderr": stderr, "n": len(mine)})
    return found


def render(found: list[dict[str, Any]], tasks: list[str]) -> str:
    """A table per task: a row per run, accuracy by multiple of the training length, – where there is none."""
    width, lines = max(len(one["run"]) for one in found) + 2, []
    for task in tasks:
        rows = [[r for r in one["results"] if r["task"] == task] for one in found]
        lines.append(f"{task}: accuracy ± standard error, {rows[0][0]['chance']:.3f} by guessing, at × the training length")
        lines.append(" " * width + "".join(f"{'×' + str(r['factor']):>15}" for r in rows[0]))
        for one, row in zip(found, rows, strict=True):
            cells = [plus_minus(r["accuracy"], r["stderr"], ".3f") for r in row]
            lines.append(one["run"].ljust(width) + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], tasks: list[str], path: Path) -> None:
    """A panel per task: accuracy against the length, a line per run; dotted is a guess."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = panels(rows, columns, width=4.6, height=3.2, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i >= len(tasks):
            axis.set_visible(False)
            continue
        for number, one in enumerate(found):
            shown = [r for r in one["results"] if r["task"] == tasks[i] and r["accuracy"] is not None]
            accuracy, error = ([r[key] for r in shown] for key in ("accuracy", "stderr"))
            at = [r["factor"] * 1.04 ** (number - (len(found) - 1) / 2) for r in shown]  # side by side
            label = one["run"] if one["run"] == one["encoding"] else f"{one['run']} ({one['encoding']})"
            axis.errorbar(at, accuracy, error, label=label, capsize=2, elinewidth=1, **line(number))
        factors = sorted({r["factor"] for one in found for r in one["results"]})
        chance = 1 / len(TASKS[tasks[i]].choices)
        axis.plot([factors[0], factors[-1]], [chance] * 2, label="a guess", **BASELINE)
        log_ticks(axis, factors)
        axis.set(title=f"{tasks[i]} (1 of {len(TASKS[tasks[i]].choices)})", ylim=(-0.03, 1.03))
        axis.set(ylabel="accuracy (± std. error)" if i % columns == 0 else None)
        axis.set(xlabel="length ÷ training length" if i + columns >= len(tasks) else None)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=min(4, len(found) + 1))
    save(figure, path)
