"""The plan of a set of runs: which are there, which are unfinished, and how long the rest takes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.checkpoint import State, newest_checkpoint
from core.config import Config, load_config
from core.data import TokenStream
from core.distributed import pick_device
from core.errors import UserError
from core.files import ROOT
from core.fingerprint import made_by, other_code
from core.results import Question, Result
from core.run import check_same, read_log
from core.sweep.scaling import hours_from, summary
from positional import ENCODINGS


@dataclass(frozen=True)
class Entry:
    """One run of the plan: a size and a variant of it, the words that make its config, how far it is."""

    size: str
    variant: str
    words: tuple[str, ...]
    cfg: Config
    state: State | None = field(default=None, compare=False)  # of its newest checkpoint
    conflict: str | None = None  # why the run in its folder is another one

    @property
    def step(self) -> int:
        return self.state.step if self.state and not self.conflict else 0

    @property
    def finished(self) -> bool:
        return bool(self.state and self.state.finished and not self.conflict)

    @property
    def tokens_left(self) -> int:
        return (self.cfg.steps - self.step) * self.cfg.tokens_per_step

    @property
    def status(self) -> str:
        if self.conflict:
            return "another run"
        if self.finished:
            return "finished"
        return f"at step {self.step:,}" if self.step else "missing"


def plan(sizes: Sequence[str], encodings: Sequence[str], seeds: Sequence[int], overrides: list[str]) -> list[Entry]:
    """An entry per size, seed and encoding, the first seed of all encodings first; no `seeds` are the configurations' own.

    Raises UserError for a configuration that cannot be, and for what only the plan decides.
    """
    own = ("--name", "--encoding", *(["--seed"] if seeds else []))
    if bad := next((word for word in overrides if word.partition("=")[0] in own), None):
        raise UserError(
            f"{bad}: a run here is called SIZE-ENCODING[-sSEED], and gets its encoding and seed from --encodings and --seeds; "
            "--out_dir keeps sets of runs apart"
        )
    given = [[f"--seed={seed}"] for seed in dict.fromkeys(seeds)] or [[]]
    entries = [
        find(size, encoding, [*overrides, *seed])
        for size in dict.fromkeys(sizes)
        for seed in given
        for encoding in dict.fromkeys(encodings)
    ]
    names = [entry.cfg.name for entry in entries]
    if twice := next((entry for entry in entries if names.count(entry.cfg.name) > 1), None):
        words = [" and ".join(entry.words[:2]) for entry in entries if entry.cfg.name == twice.cfg.name]
        raise UserError(f"{'; '.join(words[:2])}: two runs of the name {twice.cfg.name}; rename one of the files")
    return entries


def find(size: str, variant: str, overrides: list[str]) -> Entry:
    """The run of a size under a variant of it: each a file of config/ by its name or any by its path, or an encoding's name.

    Raises UserError for a configuration that cannot be.
    """
    words = (config_word(size), config_word(variant), *overrides)
    cfg = load_config(words)
    state, conflict = read_newest(cfg.folder), None
    try:
        if state:
            check_same(state, cfg, {})
    except UserError as error:
        conflict = str(error)
    return Entry(Path(size).stem, Path(variant).stem, words, cfg, state, conflict)


def read_newest(run: Path) -> State | None:
    """The state of the run's newest valid checkpoint, of which every byte is read to see that."""
    found = newest_checkpoint(run)
    return found[1] if found else None


def config_word(name: str) -> str:
    """What stands for a size or a variant on the command line of train.py."""
    file = ROOT / f"config/{name}.toml"
    if name.endswith(".toml"):
        return name
    return f"--encoding={name}" if name in ENCODINGS and not file.exists() else str(file)


def measured_rate(entry: Entry) -> float | None:
    """Median tokens/s in the log of the entry's run; None where it has none."""
    if entry.conflict:
        return None
    try:
        records = read_log((entry.cfg.folder / "log.jsonl").read_bytes())
    except OSError:
        return None
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return statistics.median(rates) if rates else None


def gpus_for(entries: list[Entry], nproc: int) -> int:
    """On how many GPUs `nproc` processes (0: one) would train; with no GPU here, as many as are asked for elsewhere."""
    devices = {entry.cfg.device for entry in entries}
    if all(pick_device(device).type == "cuda" for device in devices):
        return max(1, nproc)
    return nproc if devices == {"auto"} else 0


def hours_left(entries: list[Entry], gpus: int) -> list[tuple[float | None, bool]]:
    """(hours, whether from a measured rate) per entry; a run without a log borrows the rate of its size.

    Where there is none, they are those that core/sweep/scaling.py predicts for `gpus`; None where it cannot, as for a CPU.
    """
    rates = [measured_rate(entry) for entry in entries]
    hours: list[tuple[float | None, bool]] = []
    for entry, rate in zip(entries, rates, strict=True):
        same_size = [r for e, r in zip(entries, rates, strict=True) if r and e.size == entry.size]
        rate = rate or (statistics.median(same_size) if same_size else None)
        predicted = hours_from(entry.cfg, entry.step, gpus) if gpus and not rate else None
        hours.append((entry.tokens_left / rate / 3600, True) if rate else (predicted, False))
    return hours


def show_plan(entries: list[Entry], nproc: int = 0) -> None:
    """Print what is there and what is left for `nproc` processes."""
    width = max(24, *(len(entry.cfg.name) + 2 for entry in entries))
    print(f"{'run':{width}}{'status':>16}{'tokens left':>18}{'hours':>10}")
    gpus = gpus_for(entries, nproc)
    hours = hours_left(entries, gpus)
    for entry, (time, measured) in zip(entries, hours, strict=True):
        shown = "–" if time is None else f"{time:.1f}"
        print(f"{entry.cfg.name:{width}}{entry.status:>16}{entry.tokens_left:>18,}{shown:>9}{' ' if measured else '*'}")
    total = "–" if any(time is None for time, _ in hours) else f"{sum(time or 0 for time, _ in hours):.1f}"
    print(f"{'together':{width}}{'':16}{sum(e.tokens_left for e in entries):>18,}{total:>9}")
    if guessed := [(e.cfg, e.step) for e, (_, measured) in zip(entries, hours, strict=True) if not measured]:
        if gpus:
            print(
                f"* predicted for {gpus} GPU{'s' if gpus > 1 else ''}; the speed of this machine is known after the first steps"
            )
        else:
            print("* known after the first steps here; predicted for GPUs (docs/scaling.md):")
        print(summary(guessed))
    for conflict in filter(None, (entry.conflict for entry in entries)):
        print(conflict)


def refuse_conflicts(entries: list[Entry]) -> None:
    """Raise UserError where the folder of an entry holds another run."""
    if conflict := next((entry.conflict for entry in entries if entry.conflict), None):
        raise UserError(conflict)


def refuse_other_code(left: Sequence[Entry], entries: Sequence[Entry], records: Sequence[Result] = ()) -> None:
    """Raise UserError where what is `left` to do would put seeds of different computations under one name.

    An encoding's code and options as they are now are compared with those of the runs of `entries` and of the `records` of a
    report that have its name.
    """
    for (size, variant), entry in {(e.size, e.variant): e for e in left}.items():
        now = made_by(entry.cfg) | {"options": entry.cfg.own_options}
        made = [(f"{e.cfg.folder}", vars(e.state)) for e in entries if e.state and (e.size, e.variant) == (size, variant)]
        made += [(f"the report's seed {r['seed']}", r) for r in records if r["encoding"] == variant]
        for where, then in made:
            how = other_code(then, now)
            if then.get("options", now["options"]) != now["options"]:
                how = f"its options were {then['options']} and are {now['options']} now"
            if how:
                plugin, git = then.get("plugin"), then.get("git")
                commit = f"that was at commit {git[:10]}" if git else "of which commit it was is unknown"
                commit = f"that was by {plugin['path']}, sha256 {plugin['sha256'][:12]}…" if plugin else commit
                raise UserError(
                    f"{where}: {variant!r} is not what it was, {how}; {commit}. One name stands for one computation: go back "
                    "to that, or move the older ones away"
                )


def questions(entry: Entry, lengths: Sequence[int], max_tokens: int, min_document_tokens: int | None = None) -> list[Question]:
    """What is to be known of a finished run, by length: how well its last weights predict its own evaluation set."""
    assert entry.state is not None, f"{entry.cfg.folder} has no checkpoint"
    return [Question.standard(entry.state, length, entry.cfg.device, max_tokens, min_document_tokens) for length in lengths]


def check_data(entry: Entry, question: Question) -> None:
    """Raise UserError where the evaluation set of the entry's data is not the one that its run knows, and so no answer."""
    if TokenStream(entry.cfg.data, "val", entry.cfg.vocab_size).sha256() != question.data_sha256:
        raise UserError(
            f"{entry.cfg.data}: its evaluation set is not the one that {entry.cfg.folder} was trained beside (another sha256); "
            "--data says where that is"
        )
