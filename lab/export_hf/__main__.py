"""A run as a folder that Hugging Face's transformers loads: weights, configuration, tokenizer, model card.

    python -m lab.export_hf runs/small-learned exported/small-learned   a GPT2LMHeadModel
    python -m lab.export_hf runs/small-rope exported/small-rope         a GPTNeoXForCausalLM
    python -m lab.export_hf runs/small-carope exported/small-carope     our own code beside the weights: trust_remote_code=True

Perplexities go into the model card where eval_ppl.py has left them: python eval_ppl.py RUN --json RUN/eval.json
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse

from core.console import CommandLine, given_path, new_folder
from core.errors import command
from lab.export_hf.export import export


def parse_args() -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    parser.add_argument(
        "run", type=given_path, metavar="RUN", help="run folder (its newest valid checkpoint) or checkpoint folder"
    )
    parser.add_argument("out", type=new_folder, metavar="OUT", help="folder to write; it must not be there yet, or be empty")
    return parser.parse_args()


@command
def main() -> None:
    """Write the folder and say how to load it."""
    args = parse_args()
    architecture = export(args.run, args.out)
    code = ", trust_remote_code=True" if architecture.startswith("CARoPE") else ""
    print(f"{args.out}: {architecture}; AutoModelForCausalLM.from_pretrained({args.out!r}{code})")


if __name__ == "__main__":
    main()
