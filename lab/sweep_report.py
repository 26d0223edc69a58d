"""What a grid of runs says: means over seeds, differences to the baseline within a seed, a table and a figure."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.config import FREE_ON_RESUME, Config, load_config
from core.data import TokenStream
from core.distributed import format_name, pick_device, pick_dtype
from core.errors import UserError
from core.files import ROOT
from core.fingerprint import source_of
from core.provenance import git_version
from core.results import FIELDS
from core.sweep.plan import Entry
from core.sweep.report import differences, draw, perplexities, summarize
from positional import ENCODINGS

KEPT = (  # of an evaluation's record
    "perplexity", "nll", "stderr", "bits_per_byte", "tokens", "documents", "bytes", "step", "n_params", "git", "probe", *FIELDS,
)  # fmt: skip


def collect(cfg: Config, baseline: str, finished: dict[Entry, list[dict[str, Any]]], known: dict[str, Any]) -> dict[str, Any]:
    """All that is finished: `runs`, a record per run and length; `summary`, one per encoding and length; provenance.

    `finished` are evaluations by their run, `known` an earlier report, whose runs stay. In the summary `perplexity` and `nll`
    (nats) are means over `n` seeds, `…_stderr` their standard errors. `nll_difference` is to the `baseline` encoding, with the
    same seed. Lengths without positions have null for all.
    """
    runs = {(r["encoding"], r["seed"], r["length"]): r for r in known.get("runs", [])}
    for entry, results in finished.items():
        for result in results:
            about = {
                "encoding": entry.variant,
                "of": entry.cfg.encoding,
                "seed": entry.cfg.seed,
                "options": entry.cfg.own_options,
            }
            mine = about | {key: result[key] for key in KEPT if key in result}
            runs[entry.variant, entry.cfg.seed, result["length"]] = mine
    return {
        "baseline": baseline,
        "config": common(cfg),
        "train_tokens": cfg.steps * cfg.tokens_per_step,
        "machine": list(dict.fromkeys([*known.get("machine", []), *machine(list(finished))])),
        "git": git_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "summary": summarize(list(runs.values()), baseline),
        "runs": list(runs.values()),
    }


def common(cfg: Config) -> dict[str, Any]:
    """What all runs of a laboratory have in common."""
    return cfg.model_dump(exclude={"name", "seed", "encoding", *cfg.own_options})


def read_report(path: Path) -> dict[str, Any]:
    """A report that is there, {} where none is. Raises UserError where the file is something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if isinstance(found["runs"], list) and isinstance(found["config"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: not a report of lab.sweep; move it away, or --json says where this one goes")


def refuse_other(known: dict[str, Any], cfg: Config, args: Any, path: Path, more: bool) -> None:
    """Raise UserError where the report at `path` is of other runs, or of other evaluations, than this command's.

    `more`: whether runs are to come, which must be on the same evaluation set and in the same number format too.
    """
    now = common(cfg)
    differing = [
        f"{key} = {known['config'][key]!r} (now {now[key]!r})"
        for key in now
        if key not in FREE_ON_RESUME and known.get("config", {}).get(key, now[key]) != now[key]
    ]
    wanted: dict[str, Any] = {"max_tokens": args.max_tokens, "min_document_tokens": args.documents or None}
    if known and more:
        wanted["dtype"] = format_name(pick_dtype(cfg.dtype, pick_device(cfg.device)))
        wanted["data_sha256"] = TokenStream(cfg.data, "val", cfg.vocab_size).sha256()
    for key, value in wanted.items():
        if others := [r[key] for r in known.get("runs", []) if key in r and r[key] != value]:
            differing.append(f"{key} = {others[0]!r} (now {value!r})")
    if differing:
        raise UserError(f"{path}: holds results with {', '.join(differing)}; --json says where these go, or move it away")


def machine(entries: Sequence[Entry]) -> list[str]:
    """The devices that the runs name in their env.json."""
    found = {}
    for entry in entries:
        path = entry.cfg.folder / "env.json"
        if path.exists():
            starts = json.loads(path.read_text())
            for start in starts if isinstance(starts, list) else [starts]:
                found[f"{start['world_size']} × {start['device']}, {start['threads']} threads"] = True
    return list(found)


def render(found: dict[str, Any]) -> str:
    """Two tables, a row per encoding, a column per length: perplexity, and the difference to the baseline."""
    summary, before = found["summary"], outdated(found["runs"])
    parts = [perplexities(summary, before)]
    parts += [differences(summary, found["baseline"], before)] if len({r["encoding"] for r in summary}) > 1 else []
    tokens = max((r["tokens"] or 0 for r in found["runs"]), default=0)
    parts.append(
        f"Mean ± standard error over n seeds; {found['train_tokens']:,} training tokens at length "
        f"{found['config']['block_size']}, evaluated on the same {tokens:,} tokens at every length.\n"
    )
    if before:
        parts.append("† by code of the encoding that has changed since: another run may give other numbers.\n")
    return "\n".join(parts)


def draw_families(found: dict[str, Any], path: Path) -> None:
    """Perplexity against length, a panel per family, the baseline in each."""
    baseline = [r for r in found["summary"] if r["encoding"] == found["baseline"]]
    families: dict[str, list[dict[str, Any]]] = {}
    for record in found["summary"]:
        if record not in baseline:
            families.setdefault(family(record["encoding"], found["runs"]), baseline.copy()).append(record)
    draw(families or {found["baseline"]: baseline}, {found["config"]["block_size"]}, path, found["baseline"])


def encoding_of(variant: str, runs: Sequence[dict[str, Any]] = ()) -> str | None:
    """The encoding of a variant, as its `runs` say or else config/VARIANT.toml does; None where that is not there."""
    said = next((r["of"] for r in runs if r["encoding"] == variant and "of" in r), variant)
    if said in ENCODINGS:
        return said
    try:
        return load_config([str(ROOT / f"config/{variant}.toml")]).encoding
    except UserError:
        return None


def family(variant: str, runs: Sequence[dict[str, Any]] = ()) -> str:
    """The family of the encoding of a variant."""
    encoding = encoding_of(variant, runs)
    return ENCODINGS[encoding].family if encoding else "other"


def outdated(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The variants with a run of an encoding's earlier code; an early report does not say which code it was."""
    said = dict.fromkeys((r["encoding"], r["source"]) for r in runs if r.get("source"))
    return [variant for variant, source in said if not (now := encoding_of(variant, runs)) or source_of(now) != source]
