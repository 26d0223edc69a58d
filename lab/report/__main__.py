"""One page about a set of runs: a file that needs no network, for the screen, the phone and the printer.

    python -m lab.report runs/* -o report.html
    python -m lab.report runs/small-rope runs/small-carope --samples 2 --prompt "The mitochondria"

It holds Table 1 beside the paper's numbers, perplexity by length, training curves, throughput, the figures in
RUN/analysis/*.png, samples, the options in which the runs differ, and where each number comes from. What a run lacks is said.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import shlex
from datetime import UTC, datetime
from pathlib import Path

from core.config import load_config
from core.console import CommandLine, given_path, new_file, this_command
from core.distributed import Distributed
from core.errors import UserError, at_least, command
from core.files import ROOT, atomic_write
from core.provenance import git_version
from lab.report.data import find_runs, read_runs
from lab.report.html import Page
from lab.report.samples import add_samples
from table1 import PAPER


def parse_args() -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("runs", type=given_path, nargs="+", metavar="RUN", help="run folders; files among them are passed over")
    add("-o", "--out", type=new_file, default="report.html", metavar="FILE", help="the page [default: report.html]")
    add("--title", default="", help="[default: the encodings compared]")
    add("--samples", type=int, default=1, metavar="N", help="samples of each run and prompt, 0 is none [default: 1]")
    add("--prompt", action="append", help="text to go on from; may be repeated [default: the start of a document]")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="of the samples [default: auto]")
    args = parser.parse_args()
    at_least(0, samples=args.samples)
    return args


def plotly_script() -> str:
    """plotly.js, as its Python package brings it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the page's plots need plotly.js: `pip install -r requirements.txt`") from None
    return get_plotlyjs()


def render(args: argparse.Namespace) -> str:
    """The page for the command line."""
    plotly = plotly_script()
    records = read_runs(find_runs(args.runs))
    if args.samples:
        with Distributed.start(args.device, "float32") as dist:  # as sample.py does
            for record in records:
                add_samples(record, args.prompt or [""], args.samples, dist)
    encodings = list(dict.fromkeys(record.encoding for record in records))
    listed = ", ".join(encodings[:6]) + (f" and {len(encodings) - 6} more" if len(encodings) > 6 else "")
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    count = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    about = f"{count} · {made} · commit {(git_version() or 'unknown')[:10]}"
    line = shlex.join(["python", *this_command()])
    sizes = {size: load_config([str(ROOT / f"config/{size}.toml")]).model_dump() for size, _ in PAPER}
    return Page(records, PAPER, sizes).render(args.title or f"GPT-2 with {listed}", about, line, plotly)


@command
def main() -> None:
    """Write the page the command line asks for."""
    args = parse_args()
    out = Path(args.out)
    page = render(args)
    with atomic_write(out, "w") as file:
        file.write(page)
    print(f"{out}: {len(page.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
