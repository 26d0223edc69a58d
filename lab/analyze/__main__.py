"""Look into trained runs: what their positional encodings do, and what for. Each command writes JSON and a figure.

    python -m lab.analyze freq runs/small-carope --text "In 1969, three people flew to the Moon."
    python -m lab.analyze intervene runs/small-carope --lengths 512 1024
    python -m lab.analyze attention runs/small-rope runs/small-carope
    python -m lab.analyze tasks runs/small-rope runs/small-carope

`lab.analyze COMMAND --help` says what each looks at. Files go to --out, by default RUN/analysis of the first run.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from core.console import CommandLine, docstring_of, given_path, new_folder, this_command
from core.errors import UserError, command
from core.files import write_json
from core.provenance import git_version
from lab.analyze import attention, freq, intervene, tasks

COMMANDS = {"freq": freq, "intervene": intervene, "attention": attention, "tasks": tasks}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        doc = docstring_of(str(module.__file__))
        sub = commands.add_parser(name, help=doc.splitlines()[0].replace("%", "%%"), description=doc)
        own_data = getattr(module, "OWN_DATA", False)
        text = "run folder (its newest valid checkpoint) or checkpoint folder"
        sub.add_argument("runs", type=given_path, nargs="*" if own_data else "+", metavar="RUN", help=text)
        module.add_arguments(sub)
        if not own_data:
            sub.add_argument("--data", type=given_path, help="folder of token shards [default: the one the run was trained on]")
        sub.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="[default: auto]")
        sub.add_argument(
            "--out", type=new_folder, metavar="FOLDER", help="where the files go [default: RUN/analysis of the first run]"
        )
        sub.set_defaults(module=module)
    return parser.parse_args(argv)


@command
def main() -> None:
    """Run the analysis that the command line names, and say where its files are."""
    args = parse_args(sys.argv[1:])
    if missing := next((run for run in args.runs if not Path(run).is_dir()), None):
        raise UserError(f"{missing}: no such run folder")
    if not args.runs:
        return args.module.run_without(args)
    out = Path(args.out or Path(args.runs[0]) / "analysis")
    out.mkdir(parents=True, exist_ok=True)
    found = args.module.run(args, out)
    made = {
        "command": shlex.join(["python", *this_command()]),
        "git": git_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json(out / f"{args.command}.json", made | found)
    print(f"{out}/{args.command}.json and, beside it, {', '.join(sorted(p.name for p in out.glob(f'{args.command}*.[ph]*')))}")


if __name__ == "__main__":
    main()
