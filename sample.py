"""Text from a checkpoint, printed as it is generated.

    python sample.py runs/small-carope --prompt "The mitochondria" --num_samples 3 --top_k 50
    echo "Once upon a time" | python sample.py runs/small-carope --file -

Every document of the training stream begins with the end-of-text token, so every prompt is given one. A sample ends
there too, or after --max_new_tokens; it goes on past the training length unless the encoding has no positions there.
"""

import core.host  # noqa: F401  isort: skip  before torch, which reads what it sets

import argparse
import codecs
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from core.checkpoint import load_model
from core.console import CommandLine, given_path
from core.distributed import Distributed
from core.errors import UserError, command
from core.kernels.packed import pack
from model import GPT
from text.tokenizer import Tokenizer, load_tokenizer


def parse_args() -> argparse.Namespace:
    """The command line; abbreviations are not taken."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("run", type=given_path, metavar="RUN", help="run folder (its newest valid checkpoint) or checkpoint folder")
    add("--prompt", action="append", help="text to go on from; may be repeated [default: the start of a document]")
    add("--file", type=given_path, metavar="FILE", help="one prompt from a text file; - is standard input")
    add("--num_samples", "--num-samples", type=int, default=1, help="samples for each prompt [default: 1]")
    add(
        "--batch", type=int, default=1,
        help="samples of a prompt drawn together: more tokens a second, but rounding may make a sample another one than "
        "drawn alone [default: 1]",
    )  # fmt: skip
    add("--max_new_tokens", "--max-new-tokens", type=int, default=200, help="tokens of a sample [default: 200]")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token [default: 0.8]")
    add("--top_k", "--top-k", type=int, help="draw from the k likeliest tokens only [default: all]")
    add("--top_p", "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass only [default: 1]")
    add("--seed", type=int, default=1, help="sample i of a prompt depends on seed + i alone [default: 1]")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="[default: auto, the first that is there]")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="float32", help="of weights and matmuls [default: float32]")
    return parser.parse_args()


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts in the order --prompt, --file; the empty one where there is none."""
    prompts = list(args.prompt or [])
    if args.file:
        try:
            prompts.append(sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.file}: cannot be read as UTF-8 text ({error})") from None
    return prompts or [""]


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a value outside its range."""
    for name, low, high in (
        ("num_samples", 1, None), ("batch", 1, None), ("max_new_tokens", 1, None), ("temperature", 0, None), ("top_k", 1, None),
        ("top_p", 1e-9, 1), ("seed", 0, None),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            limit = f"at least {low}" if high is None else f"above 0 and at most {high}"
            raise UserError(f"--{name} = {value}: must be {limit}")


class Sample:
    """One continuation as it grows: text out of tokens, up to the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.n_tokens, self.ended = tokenizer, 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character

    def add(self, token: int) -> str:
        """The text that is complete with this token; none after the end."""
        if self.ended:
            return ""
        self.n_tokens, self.ended = self.n_tokens + 1, token == self.tokenizer.eot
        return "" if self.ended else self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def rest(self) -> str:
        """What is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)


def print_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    seeds: Sequence[int],
    args: argparse.Namespace,
    folder: Path,
    dist: Distributed,
) -> None:
    """Print a continuation of `prompt` for each of `seeds`, drawn together: the first as it comes, then the others.

    Says so where the positions end early.
    """
    samples, texts = [Sample(tokenizer) for _ in seeds], [f"--- {folder}, seed {seed}\n{prompt}" for seed in seeds]
    generators = [torch.Generator(dist.device).manual_seed(seed) for seed in seeds]
    idx_BT = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt).tolist()]], device=dist.device).expand(len(seeds), -1)
    options = (tokenizer.n_vocab, args.temperature, args.top_k, args.top_p, generators)
    print(texts[0], end="", flush=True)
    texts[0] = ""
    with dist.autocast():
        for next_B in model.generate(idx_BT, args.max_new_tokens, *options):
            texts = [text + sample.add(token) for text, sample, token in zip(texts, samples, next_B.tolist(), strict=True)]
            print(texts[0], end="", flush=True)
            texts[0] = ""
            if all(sample.ended for sample in samples):
                break
    print(*(text + sample.rest() for text, sample in zip(texts, samples, strict=True)), sep="\n")
    for sample in samples:
        if sample.n_tokens < args.max_new_tokens and not sample.ended:
            limit = f"encoding {model.cfg.encoding!r} has positions for {model.max_len} tokens only"
            print(f"[{limit}: stopped after {sample.n_tokens} new ones]", file=sys.stderr)


@command
def main() -> None:
    """Print the samples the command line asks for."""
    args = parse_args()
    check(args)
    prompts = read_prompts(args)
    dist = Distributed.start(args.device, args.dtype)
    model, state, folder = load_model(args.run)
    pack(model.to(dist.device), dist.dtype)
    tokenizer = load_tokenizer(state.tokenizer)
    if tokenizer.n_vocab > model.cfg.vocab_size:
        raise UserError(
            f"{args.run}: its {model.cfg.vocab_size} ids are fewer than the {tokenizer.n_vocab} of {tokenizer.name!r}, "
            "the tokenizer of shards without a manifest; prepare_fineweb.py writes one"
        )
    for prompt in prompts:
        n_ids = len(tokenizer.encode(prompt))
        if model.max_len is not None and n_ids >= model.max_len:
            raise UserError(f"prompt of {n_ids} tokens: encoding {model.cfg.encoding!r} has positions for {model.max_len} only")
        seeds = range(args.seed, args.seed + args.num_samples)
        for first in range(0, len(seeds), args.batch):
            print_samples(model, tokenizer, prompt, seeds[first : first + args.batch], args, folder, dist)


if __name__ == "__main__":
    main()
