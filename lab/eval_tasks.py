"""Accuracy of runs on tasks beyond perplexity, by EleutherAI's lm-evaluation-harness.

    pip install -e '.[eval]'
    python -m lab.eval_tasks runs/small-carope --tasks hellaswag,lambada_openai,arc_easy --json runs/small-carope/tasks.json
    python -m lab.eval_tasks runs/small-rope --tasks piqa --limit 100 --batch 16

The run is exported into a temporary folder, which the harness loads as any other model of transformers; the texts are its own,
downloaded where they are not in its cache. As it does with GPT-2, it puts no end-of-text token before a text; --add_bos does.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import tempfile
from pathlib import Path
from typing import Any

from core.checkpoint import find_checkpoint
from core.console import CommandLine, given_path, new_file
from core.distributed import pick_device
from core.errors import UserError, at_least, command
from core.files import write_json
from core.provenance import git_version
from lab.export_hf.export import export


def parse_args() -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("runs", type=given_path, nargs="+", metavar="RUN", help="run folder (its newest valid checkpoint) or checkpoint folder")
    add("--tasks", required=True, metavar="A,B", help="names of the harness, e.g. hellaswag,lambada_openai,arc_easy,piqa")
    add("--include_path", "--include-path", type=given_path, metavar="DIR", help="folder with task files (YAML) of your own")
    add("--num_fewshot", "--num-fewshot", type=int, help="worked examples before each question [default: the task's own]")
    add("--limit", type=int, help="only the first so many questions of each task: to try it, not to report it")
    add("--batch", type=int, default=1, help="texts per forward pass; tasks that generate take 1 [default: 1]")
    add("--max_length", "--max-length", type=int, help="tokens of a text, cut on the left [default: the training length]")
    add("--add_bos", "--add-bos", action="store_true", help="an end-of-text token before every text, as in training")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="[default: auto, the first that is there]")
    add("--json", type=new_file, metavar="FILE", help="also write the results as a list of JSON objects")
    return parser.parse_args()


def evaluate_tasks(run: str, tasks: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What the harness finds for a run: `tasks` is task → metric → value. Raises UserError."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=args.include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(f"--tasks: the harness has no {', '.join(unknown)}; `python -m lm_eval ls tasks` lists them")
    folder, state = find_checkpoint(run)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "export"
        architecture = export(folder, out)
        model = {"pretrained": str(out), "dtype": "float32", "add_bos_token": args.add_bos, "max_length": args.max_length}
        try:
            found = lm_eval.simple_evaluate(
                "hf",
                model | {"trust_remote_code": architecture.startswith("CARoPE")},
                tasks=tasks,
                num_fewshot=args.num_fewshot,
                batch_size=args.batch,
                device=str(pick_device(args.device)),
                limit=args.limit,
                log_samples=False,
                task_manager=manager,
            )
        except OSError as error:  # what a download that fails raises is one
            reason = str(error).partition("\n")[0]
            raise UserError(f"{', '.join(tasks)}: not evaluated ({reason}); are the texts cached or can they be had?") from None
    assert found is not None
    return {
        "run": state.config["name"], "encoding": state.config["encoding"], "step": state.step, "checkpoint": str(folder),
        "git": git_version(), "lm_eval": lm_eval.__version__, "limit": args.limit, "add_bos": args.add_bos,
        "max_length": args.max_length, "num_fewshot": args.num_fewshot, "versions": found["versions"],
        "n": {task: sizes["effective"] for task, sizes in found["n-samples"].items()},
        "tasks": {task: metrics_of(found["results"][task]) for task in found["results"]},
    }  # fmt: skip


def metrics_of(result: dict[str, Any]) -> dict[str, float]:
    """Metric → number, and its standard error as METRIC_stderr, where there is one."""
    return {key.removesuffix(",none"): value for key, value in result.items() if "," in key and isinstance(value, float)}


def render(results: list[dict[str, Any]]) -> str:
    """A line per run, task and metric."""
    lines = []
    for one in results:
        for task, metrics in one["tasks"].items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    error = metrics.get(f"{metric}_stderr")
                    spread = f" ± {error:.4f}" if error is not None else ""
                    lines.append(f"{one['run']}  {one['encoding']}  {task}  {metric}  {value:.4f}{spread}")
    return "\n".join(lines)


@command
def main() -> None:
    """Evaluate the runs of the command line, print the numbers, write the JSON."""
    args = parse_args()
    at_least(1, batch=args.batch, limit=args.limit, max_length=args.max_length)
    try:
        import lm_eval  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -e '.[eval]'") from None
    results: list[dict[str, Any]] = []
    for run in args.runs:
        results.append(evaluate_tasks(run, list(filter(None, args.tasks.split(","))), args))
        if args.json:  # after each run: what is evaluated is kept, whatever happens to the next
            write_json(Path(args.json), results)
    print(render(results))


if __name__ == "__main__":
    main()
