"""What run folders hold, read for the report: what is missing or damaged becomes a note and never an error."""

import json
import math
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.checkpoint import MODEL, list_checkpoints, peek
from core.errors import UserError
from core.results import read_results
from core.run import read_log

MARKS = ("config.toml", "log.jsonl", "env.json", "checkpoints")  # a folder with one of these is a run
POINTS = 1000  # of a curve: more than a screen is wide
IMAGE_BYTES = 4 * 2**20
OWN = ("name", "out_dir")  # of every run its own, so no difference worth a column


@dataclass
class Variant:
    """The evaluations of a run that belong together, by length: of one step, on the same tokens, special in the same ways."""

    step: int | None
    special: tuple[str, ...]
    by_length: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether they are a run's perplexities proper, but for a limit of tokens."""
        return all(words.startswith("first ") for words in self.special)

    @property
    def tokens(self) -> int:
        return max((r.get("tokens") or 0 for r in self.by_length.values()), default=0)


@dataclass
class RunRecord:
    """A run as the report shows it. `curves`: per key of the log (tokens, values), thinned; `notes`: what is not there."""

    folder: Path
    name: str
    config: dict[str, Any]
    variants: list[Variant]
    starts: list[dict[str, Any]]
    curves: dict[str, tuple[list[float], list[float]]]
    last_step: int | None
    rate: float | None  # tokens/s, median
    mfu: float | None  # median
    memory: float | None  # bytes, the largest
    images: list[tuple[str, bytes]]
    tasks: list[dict[str, Any]] = field(default_factory=list)  # what lab.eval_tasks found
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # prompt, text, remark
    notes: list[str] = field(default_factory=list)

    @property
    def encoding(self) -> str:
        return str(self.config.get("encoding", "unknown"))

    @property
    def trained_tokens(self) -> int | None:
        """Training tokens that the run has seen, as far as its log goes."""
        per_step = self.config.get("tokens_per_step")
        return self.last_step * per_step if self.last_step is not None and isinstance(per_step, int) else None

    @property
    def n_params(self) -> int | None:
        counts = [s["n_params"].get("total") for s in self.starts if isinstance(s.get("n_params"), dict)]
        counts += [r.get("n_params") for variant in self.variants for r in variant.by_length.values()]
        return next((n for n in reversed(counts) if isinstance(n, int)), None)


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The run folders among `paths`; files are passed over, as `runs/*` names lab.json too. Raises UserError otherwise."""
    folders = []
    for path in map(Path, paths):
        try:
            if path.is_file():
                continue
            if not path.is_dir():
                raise UserError(f"{path}: no such folder; give run folders, as train.py writes them: runs/NAME")
            if not any((path / mark).exists() for mark in MARKS):
                raise UserError(f"{path}: no run, it has none of {', '.join(MARKS)}; give run folders, as runs/NAME")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        folders.append(path)
    unique = list({path.resolve(): path for path in folders}.values())
    if not unique:
        raise UserError(f"{' '.join(paths)}: files only, no run folder; give some, as runs/NAME")
    return unique


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """A record for each folder; where two folders have the same name, with as much of their paths as tells them apart."""
    records = [read_run(folder) for folder in folders]
    names = [record.name for record in records]
    for record in records:
        if names.count(record.name) > 1:
            record.name = str(record.folder)
    return records


def read_run(folder: Path) -> RunRecord:
    """All that the folder has."""
    notes: list[str] = []
    config = _read_config(folder, notes)
    log = _read_log(folder, notes)
    training = [r for r in log if _number(r.get("loss"))]
    if log and not training:
        notes.append("log.jsonl has no training loss")
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        variants=_read_variants(folder, config, notes),
        starts=_read_starts(folder, notes),
        curves={key: curve for key in ("loss", "val_loss", "tokens_per_second", "mfu") if (curve := thinned(log, key))[0]},
        last_step=max((r["step"] for r in log if isinstance(r["step"], int)), default=None),
        rate=_median(training, "tokens_per_second"),
        mfu=_median(training, "mfu"),
        memory=max((r["peak_memory_bytes"] for r in training if _number(r.get("peak_memory_bytes"))), default=None),
        images=_read_images(folder, notes),
        tasks=_read_tasks(folder, config, notes),
        notes=notes,
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _median(records: Iterable[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in records if _number(r.get(key))]
    return statistics.median(values) if values else None


def _read_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except OSError:
        notes.append("no config.toml")
    except ValueError as error:  # not UTF-8, or not TOML
        notes.append(f"config.toml cannot be read ({error})")
    return {}


def _read_log(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        log = read_log((folder / "log.jsonl").read_bytes())
    except OSError:
        log = []
    if not log:
        notes.append("no log: no curves and no speed")
    return [r for r in log if _number(r["step"])]


def _read_starts(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        found = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        notes.append("no readable env.json: where and how it was trained is unknown")
        return []
    return [start for start in (found if isinstance(found, list) else [found]) if isinstance(start, dict)]


def _read_variants(folder: Path, config: dict[str, Any], notes: list[str]) -> list[Variant]:
    variants: dict[tuple[Any, ...], Variant] = {}
    try:
        newest = [state for path in list_checkpoints(folder)[-1:] if (state := peek(path))]
    except UserError as error:
        newest = []
        notes.append(str(error))
    for r in _own_results(folder, "eval.json", config, notes):
        if not isinstance(r.get("length"), int):
            continue
        if any(r.get("step") == state.step and r.get("weights") not in (None, state.sha256.get(MODEL)) for state in newest):
            notes.append(f"a result at length {r['length']} is of other weights than the newest checkpoint's and left out")
            continue
        key = (r.get("step"), tuple(_special(r)))
        variants.setdefault((*key, str(r.get("data_sha256"))), Variant(*key)).by_length[r["length"]] = r
    if not variants:
        notes.append(f"not evaluated; eval_ppl.py {folder} --json {folder / 'eval.json'} does it")
    return list(variants.values())


def _special(result: dict[str, Any]) -> list[str]:
    """What is special about a result; early files do not say all of it."""
    if isinstance(result.get("special"), list):
        return list(map(str, result["special"]))
    scaled = [f"{result['rope_scaling']} {result.get('scale')}"] if result.get("rope_scaling") else []
    return scaled + ([f"first {result['max_tokens']}"] if result.get("max_tokens") else [])


def _own_results(folder: Path, file: str, config: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The results in `file` that are this run's: several runs may be evaluated into one file."""
    names = (None, config.get("name"), folder.name)
    try:
        return [r for r in read_results(folder / file) if r.get("run") in names]
    except UserError as error:
        notes.append(str(error))
        return []


def _read_tasks(folder: Path, config: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    found = [r for r in _own_results(folder, "tasks.json", config, notes) if isinstance(r.get("tasks"), dict)]
    return [r for r in found if all(isinstance(metrics, dict) for metrics in r["tasks"].values())]


def _read_images(folder: Path, notes: list[str]) -> list[tuple[str, bytes]]:
    images = []
    for path in sorted(folder.glob("analysis/*.png")):
        try:
            image = path.read_bytes() if path.stat().st_size <= IMAGE_BYTES else b""
        except OSError:
            image = b""
        if image.startswith(b"\x89PNG"):
            images.append((path.name, image))
        else:
            notes.append(f"analysis/{path.name} is left out: no PNG of at most {IMAGE_BYTES // 2**20} MiB")
    return images


def thinned(log: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(tokens, values) of the records that have `key`; beyond POINTS of them, means over neighbors."""
    points = [(r["tokens"], r[key]) for r in log if _number(r.get(key)) and _number(r.get("tokens"))]
    group = math.ceil(len(points) / POINTS)
    if group > 1:
        groups = [points[i : i + group] for i in range(0, len(points), group)]
        points = [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups]
    return [x for x, _ in points], [float(f"{y:.6g}") for _, y in points]


def split_config(records: Sequence[RunRecord]) -> tuple[list[str], dict[str, Any]]:
    """Keys in which runs differ, and those in which they do not with their values.

    A run of an earlier version that lacks a key does not differ in it.
    """
    keys = dict.fromkeys(key for record in records for key in record.config if key not in OWN)
    values = {key: [r.config[key] for r in records if key in r.config] for key in keys}
    differing = [key for key in keys if any(value != values[key][0] for value in values[key])]
    return differing, {key: values[key][0] for key in keys if key not in differing}
