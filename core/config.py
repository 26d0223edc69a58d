"""The one typed configuration: TOML files layered from left to right, then --key=value.

    cfg = load_config(["config/small.toml", "config/carope.toml", "--seed=2"])

Each encoding declares options of its own; a Config has those of its encoding, under their names.

pydantic checks types and limits, argparse splits the command line; a value from a file and one from the command line
go through the same checks and are refused in the same words.
"""

import argparse
import difflib
import functools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from core.console import CommandLine, add_plugin, given_path
from core.errors import UserError
from core.host import ranks
from positional import ENCODINGS, Option

Count = Annotated[int, Field(gt=0, le=2**40)]  # nobody means more, and above it arithmetic overflows or takes forever
Place = Annotated[str, pydantic.AfterValidator(given_path)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # breaks messages of one line, terminals or file systems


GONE = {"replay_step"}  # options in the files of earlier runs that no longer exist; they decided no result


class Config(BaseModel):
    """Everything that decides what a run computes; frozen and validated. Raises pydantic.ValidationError.

    Besides the fields below it has the options of its encoding; those of other encodings are checked and left out.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    # run
    name: str = Field(
        "", description="run folder below out_dir [default: SIZE-ENCODING, after the config files; from seed 2 on -sSEED]"
    )
    out_dir: Place = Field("runs", description="where run folders are kept")
    data: Place = Field("data/fineweb-edu-10B", description="folder of token shards, as prepare_fineweb.py writes it")
    seed: int = Field(1, ge=0, lt=2**63, description="seed of the initial weights")
    init_from: Place = Field(
        "",
        description="weights to start from: a run, a checkpoint or a Hugging Face GPT-2 (folder); of any encoding",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="auto is the first of the others that is there")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="autocast type, weights stay float32; auto is bfloat16 where the hardware has it"
    )
    residual: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the residual stream; bfloat16 moves fewer bytes and changes the numbers"
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto is on for cuda")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="what the ranks of torchrun share: ddp only gradients, fsdp also the memory for weights and optimizer",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the input of each block and compute the block again in the backward pass"
    )
    kernel: Literal["auto", "triton", "eager"] = Field(
        "auto", description="rotation of queries and keys; auto is triton on a CUDA device, where it can run, else eager"
    )

    # model
    encoding: str = Field("rope", description="positional encoding; the options of each stand below")
    n_layer: PositiveInt = Field(12, le=1000, description="transformer blocks")
    n_head: PositiveInt = Field(12, le=65536, description="attention heads")
    n_embd: PositiveInt = Field(768, le=65536, description="model width, channels")
    vocab_size: PositiveInt = Field(50304, le=65536, description="embedding rows, token ids with padding")
    block_size: PositiveInt = Field(512, le=2**24, description="training length, tokens")

    # optimization
    micro_batch: Count = Field(32, description="sequences per forward pass and device")
    tokens_per_step: Count = Field(524_288, description="tokens per optimizer step, over all devices")
    steps: Count = Field(19_000, description="optimizer steps")
    warmup_steps: CountOrZero = Field(750, description="steps of linear learning-rate warm-up")
    lr: PositiveFloat = Field(6e-4, description="learning rate after the warm-up")
    min_lr: NonNegativeFloat = Field(6e-5, description="learning rate at the end of the cosine")
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW's, on tensors of two or more dimensions")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's β1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's β2")
    grad_clip: PositiveFloat = Field(1.0, allow_inf_nan=True, description="largest gradient norm; inf is any")

    # evaluation, logs, checkpoints
    eval_every: Count = Field(250, description="steps between validations")
    eval_tokens: Count = Field(655_360, description="tokens of a validation during training (20 batches of 64 × 512)")
    final_eval_tokens: CountOrZero = Field(0, description="tokens of the last validation; 0 is the whole evaluation set")
    log_every: Count = Field(1, description="steps between records in log.jsonl")
    save_every: Count = Field(1000, description="steps between checkpoints")
    keep_checkpoints: Count = Field(2, description="newest checkpoints to keep, besides the best")
    async_checkpoint: bool = Field(False, description="write checkpoints behind the back of the next steps")
    wandb: Literal["online", "offline", "disabled"] = Field("disabled", description="log to Weights & Biases")
    wandb_project: str = Field("carope", description="Weights & Biases project")
    tensorboard: bool = Field(False, description="log to TensorBoard, into the run folder")

    # trouble
    on_spike: Literal["off", "warn", "skip", "stop"] = Field(
        "off", description="where loss or gradient norm jumps: say so, leave out the update, or stop before it"
    )
    spike_threshold: PositiveFloat = Field(
        8.0, description="what a jump is: so many robust standard deviations (MAD) of the log above the median of 128 steps"
    )
    verify_data: Literal["quick", "full"] = Field(
        "quick", description="check of the shards at the start; quick: sizes and headers, full: every token and sha256"
    )
    dist_timeout: PositiveFloat = Field(
        600.0, le=1e9, description="seconds without progress after which a run gives up a hung rank"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_options(cls, values: dict[str, Any]) -> dict[str, Any]:
        others = {key: value for key, value in values.items() if key not in cls.model_fields and key not in GONE}
        checked = _options_type(tuple(options().values()))(**others)
        name = values.get("encoding", cls.model_fields["encoding"].default)
        own = ENCODINGS[name].options if isinstance(name, str) and name in ENCODINGS else ()
        fields = {key: value for key, value in values.items() if key in cls.model_fields}
        return fields | {option.name: getattr(checked, option.name) for option in own}

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "Config":
        if self.encoding not in ENCODINGS:
            raise ValueError(
                f"encoding = {self.encoding!r}: {_did_you_mean(self.encoding, ENCODINGS)}there are {', '.join(ENCODINGS)}; "
                "--plugin FILE.py brings others"
            )
        for key, value in self:
            if isinstance(value, str) and UNPRINTABLE.search(value):
                raise ValueError(f"{key} = {value!r}: control characters are not taken, nor what is not UTF-8")
        if self.n_embd % self.n_head:
            works = ", ".join(str(h) for h in _nearest_divisors(self.n_embd, self.n_head))
            raise ValueError(
                f"n_head = {self.n_head}: n_embd = {self.n_embd} must be a multiple of it; "
                f"the nearest that work: n_head = {works}"
            )
        ENCODINGS[self.encoding].check(self)
        if self.tokens_per_step % self.block_size:
            below = self.tokens_per_step // self.block_size * self.block_size
            works = " or ".join(str(n) for n in (below, below + self.block_size) if n)
            raise ValueError(
                f"tokens_per_step = {self.tokens_per_step}: must be a multiple of block_size = {self.block_size}; "
                f"the nearest that work: {works}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr}: must not exceed lr = {self.lr}")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out_dir) / self.name

    @property
    def own_options(self) -> dict[str, Any]:
        """The values of the encoding's options."""
        return dict(self.model_extra or {})

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token of a forward and backward pass at the training length: 6 (12 L C² + V C) + 12 L C T."""
        per_token = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6 * per_token + 12 * self.n_layer * self.n_embd * self.block_size


TAKEN = {"files", "help", "plugin", "print_config", "quiet"}  # by the command line itself


def options() -> dict[str, Option]:
    """The options of all encodings, by name.

    Raises UserError where one has the name of a field of Config, or where two that differ have one name.
    """
    found: dict[str, Option] = {}
    for encoding, cls in ENCODINGS.items():
        for option in cls.options:
            if option.name in TAKEN or option.name in Config.model_fields or found.setdefault(option.name, option) != option:
                raise UserError(f"{option.name}: of encoding {encoding!r}, is the name of another option; call it otherwise")
    return found


@functools.cache
def _options_type(all_options: tuple[Option, ...]) -> type[BaseModel]:
    limits = ("ge", "gt", "le", "lt", "multiple_of")
    fields: dict[str, Any] = {
        option.name: (
            Literal[option.choices] if option.choices else type(option.default),
            Field(option.default, **{limit: getattr(option, limit) for limit in limits}),
        )
        for option in all_options
    }
    return pydantic.create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


# What may differ when a run is continued: none of it changes what the next step computes, up to rounding.
FREE_ON_RESUME = {
    "name", "out_dir", "data", "device", "dtype", "compile", "parallel", "activation_checkpointing", "kernel", "micro_batch",
    "eval_every", "eval_tokens", "final_eval_tokens", "log_every", "save_every", "keep_checkpoints", "async_checkpoint",
    "wandb", "wandb_project", "tensorboard", "on_spike", "spike_threshold", "verify_data", "dist_timeout",
}  # fmt: skip


def grad_accum(cfg: Config, world_size: int) -> int:
    """Micro-steps per optimizer step on each of `world_size` devices.

    Raises UserError, with the nearest settings that work, where tokens_per_step is no multiple of
    micro_batch × block_size × world_size.
    """
    per_pass = cfg.micro_batch * cfg.block_size * world_size
    accum, rest = divmod(cfg.tokens_per_step, per_pass)
    if not rest:
        return accum
    works = [f"--tokens_per_step={n}" for n in (accum * per_pass, (accum + 1) * per_pass) if n]
    rows, odd = divmod(cfg.tokens_per_step, cfg.block_size * world_size)
    if not odd:
        works += [f"--micro_batch={b}" for b in _nearest_divisors(rows, cfg.micro_batch)]
    raise UserError(
        f"tokens_per_step = {cfg.tokens_per_step} is no multiple of micro_batch {cfg.micro_batch} "
        f"× block_size {cfg.block_size} × {world_size} device(s) = {per_pass}; the nearest that work: {', '.join(works)}"
    )


def load_config(argv: Sequence[str]) -> Config:
    """Config from `argv`: config files, then --key=value (or --key value; underscores or hyphens).

    Raises UserError naming key, value, place, limit and the nearest right key; SystemExit after --help, --print_config.
    """
    for word, after in pairwise([*argv, ""]):
        if UNPRINTABLE.search(word):
            raise UserError(f"{word!r} (command line): control characters are not taken, nor what is not UTF-8")
        is_value = after and not after.startswith("-") and not after.endswith(".toml")
        if after == "=" or (word.startswith("--") and word.endswith("=") and is_value):
            raise UserError(f"{word} {after}: --key=value is written without spaces")
    known = _known(argv)
    args, unknown = _parser().parse_known_intermixed_args(list(argv))
    for word in unknown:
        key = word.lstrip("-").split("=")[0].replace("-", "_")
        raise UserError(f"{word}: no such option; {_did_you_mean(key, known, '--')}--help lists them")
    layers = _layers(args.files, known)
    overrides = {key: value for key, value in vars(args).items() if key in known}
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, layer in [*layers, ("command line", overrides)]:
        values |= layer
        places |= dict.fromkeys(layer, place)
    try:
        cfg = Config(**values)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(error, places)) from None
    if not cfg.name:
        cfg = cfg.model_copy(update={"name": _run_name(layers, cfg)})
    if Path(cfg.name).name != cfg.name or cfg.name in (".", ".."):
        raise UserError(f"name = {cfg.name!r}: must be a plain folder name; out_dir says where it lies")
    if args.print_config:
        print(to_toml(cfg), end="")
        raise SystemExit(0)
    grad_accum(cfg, ranks().world_size)
    return cfg


def to_toml(cfg: Config) -> str:
    """`cfg` as a TOML document that load_config reads back."""
    # JSON writes strings and booleans as TOML does, and repr writes numbers so, inf too
    written = {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
        for key, value in cfg.model_dump().items()
    }
    return "".join(f"{key} = {text}\n" for key, text in written.items())


def _known(argv: Sequence[str]) -> list[str]:
    """The keys that there are, with those of the plugins that the command line names."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_plugin(early)
    with suppress(argparse.ArgumentError):  # _parser says it in its own words
        early.parse_known_args(argv)
    return [*Config.model_fields, *options()]


def _layers(files: Sequence[str], known: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for file in files:
        try:
            layer = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            near = _did_you_mean(file, [str(p) for p in Path("config").glob("*.toml")])
            raise UserError(f"{file}: cannot be read ({error.strerror}); {near}a config file ends in .toml") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not TOML ({error})") from None
        for key in layer.keys() - GONE - set(known):
            raise UserError(f"{file}: no such key {key!r}; {_did_you_mean(key, known)}--help lists them")
        found.append((file, layer))
    return found


def _run_name(layers: Sequence[tuple[str, dict[str, Any]]], cfg: Config) -> str:
    """SIZE-ENCODING[-sSEED], the same however the encoding was chosen.

    A file that sets the encoding, its options and nothing else gives the name of the encoding, such as sinusoidal_equal, where
    it has the last word; all others are sizes.
    """
    keys = {"encoding", *options()}
    of_encoding = [(file, layer) for file, layer in layers if "encoding" in layer and layer.keys() <= keys]
    sizes = [Path(file).stem for file, layer in layers if (file, layer) not in of_encoding] or ["gpt2"]
    encoding = cfg.encoding
    if of_encoding and of_encoding[-1][1]["encoding"] == encoding:
        encoding = Path(of_encoding[-1][0]).stem
    return "-".join([*sizes, encoding, *([f"s{cfg.seed}"] if cfg.seed != 1 else [])])


def _parser() -> argparse.ArgumentParser:
    about = """Config files are layered from left to right; --key=value goes on top.

    python train.py config/demo.toml config/carope.toml
    torchrun --standalone --nproc_per_node=2 train.py config/small.toml config/rope.toml --seed=2"""
    parser = CommandLine(about, usage="%(prog)s [CONFIG.toml ...] [--key=value ...]")
    parser.add_argument(
        "files", type=given_path, nargs="*", metavar="CONFIG.toml", help="e.g. config/small.toml config/carope.toml"
    )
    parser.add_argument("--print_config", "--print-config", action="store_true", help="show the result as TOML and leave")
    for key, field in Config.model_fields.items():
        choices = getattr(field.annotation, "__args__", None)
        kind = "|".join(choices) if choices else getattr(field.annotation, "__name__", "value")
        _add(parser, key, kind, field.description or "", field.default)
    group = parser.add_argument_group("options of encodings")
    for option in options().values():
        of = next(name for name, cls in ENCODINGS.items() if option in cls.options)
        kind = "|".join(option.choices) or type(option.default).__name__
        _add(group, option.name, kind, f"{of}: {option.help}".replace("%", "%%"), option.default)
    return parser


def _add(parser: argparse._ActionsContainer, key: str, kind: str, text: str, default: Any) -> None:
    names = dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"])
    shown = "" if "[default" in text else f" [default: {default}]"
    parser.add_argument(*names, default=argparse.SUPPRESS, metavar=kind, help=text + shown)


def _one_line(error: pydantic.ValidationError, places: dict[str, str]) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    key = str(first["loc"][0])
    return f"{key} = {_shown(first['input'])} ({places.get(key, 'default')}): {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "(a number of too many digits)"
    return text if len(text) <= 80 else f"{text[:79]}…"


ELSEWHERE = {  # what nanoGPT, llm.c and transformers call it → what it is here
    "batch_size": "micro_batch, sequences of one forward pass on a device; tokens_per_step is the whole batch, in tokens",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "nothing: it follows from tokens_per_step, micro_batch, block_size and the devices",
    "grad_accum": "nothing: it follows from tokens_per_step, micro_batch, block_size and the devices",
    "total_batch_size": "tokens_per_step",
    "learning_rate": "lr",
    "max_lr": "lr",
    "max_iters": "steps",
    "max_steps": "steps",
    "num_iterations": "steps",
    "lr_decay_iters": "steps: the rate falls to min_lr at the last one",
    "warmup_iters": "warmup_steps",
    "decay_lr": "min_lr: as large as lr, it stays",
    "eval_interval": "eval_every",
    "eval_iters": "eval_tokens",
    "eval_only": "eval_ppl.py RUN",
    "log_interval": "log_every",
    "always_save_checkpoint": "save_every",
    "replay_step": "python -m lab.replay RUN STEP",
    "dropout": "nothing: the paper's models have none",
    "bias": "nothing: all linear layers have one, as GPT-2's",
    "wandb_log": "wandb, one of online, offline and disabled",
    "wandb_run_name": "name",
    "dataset": "data, a folder",
    "sequence_length": "block_size",
    "max_seq_len": "block_size",
    "n_ctx": "block_size",
    "backend": "nothing: it is NCCL on GPUs and gloo on CPUs",
}


def _did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    if word in ELSEWHERE and "lr" in (known := list(known)):
        is_key = ELSEWHERE[word].split(",")[0].split(":")[0] in known
        return f"here it is {prefix if is_key else ''}{ELSEWHERE[word]}. "
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    near.sort(key=lambda one: sorted(one) != sorted(word))  # of those as near, the one with the same letters: rpoe is rope
    return f"did you mean {prefix}{near[0]}? " if near else ""


def _nearest_divisors(n: int, wanted: int) -> list[int]:
    """The largest divisor of `n` below `wanted` and the smallest above it, where they exist."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)})
    return [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
