"""Put what is computed into README.md and docs/: from results/, from the model of scaling, from the classes of encodings.

python -m lab.pages                                 # all pages
python -m lab.pages docs/encodings.md README.md     # some
"""

from collections.abc import Callable

from core.console import CommandLine
from core.errors import UserError, command
from core.files import ROOT
from core.tables import write_blocks
from lab.pages import encodings, findings, performance, scaling

PAGES: dict[str, Callable[[], dict[str, str]]] = {  # page → the text for each of its markers
    "README.md": lambda: {"families": encodings.families()},
    "docs/encodings.md": lambda: {"encodings": encodings.render()},
    "docs/findings.md": findings.blocks,
    "docs/performance.md": performance.blocks,
    "docs/reproduce.md": lambda: {"table1": scaling.render_table1()},
    "docs/scaling.md": scaling.blocks,
}


@command
def main() -> None:
    """Write the pages that the command line names, or all; docs/findings.md with its figures and the README's."""
    parser = CommandLine(__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"some of {', '.join(PAGES)} [default: all]")
    pages = parser.parse_args().pages or list(PAGES)
    if unknown := [page for page in pages if page not in PAGES]:
        raise UserError(f"{unknown[0]}: nothing is computed there; pages are {', '.join(PAGES)}")
    for page in pages:
        write_blocks(ROOT / page, PAGES[page]())
    if "docs/findings.md" in pages:
        findings.draw_figures()


if __name__ == "__main__":
    main()
