"""Which files a dataset on the Hugging Face hub has: those of a folder, or those of a name, a config and a split.

The latter `datasets` knows, from the dataset's card and the names of its files.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.errors import UserError
from text.corpus import COMPRESSED, COMPRESSED_TEXT_RATIO, SUFFIXES, SourceFile, is_text, one_line
from text.hub import FEW_ATTEMPTS, Dataset

CONVERTED = "refs/convert/parquet"  # the branch into which the hub converts datasets of other formats
PARQUET_TEXT_RATIO = 1.6  # bytes of text per byte of FineWeb's zstd parquet files, their other columns included
PATHS_AT_A_TIME = 500  # that are asked for
NO_NAMES = '<>:"|?*\\'  # of files, on Windows, and for huggingface_hub


def files_in_folder(dataset: Dataset, wanted: Callable[[str], bool]) -> tuple[str, list[SourceFile]]:
    """The commit of a dataset's revision, and the files in its folder whose names are `wanted`, sorted by name.

    Offline they are those of the cache. Raises UserError.
    """
    from huggingface_hub import HfApi, RepoFile, constants, snapshot_download

    what, kind = f"revision {dataset.revision}", {"repo_type": "dataset"}
    if constants.HF_HUB_OFFLINE:
        below = f"{dataset.folder}/*" if dataset.folder else "*"
        cached = partial(snapshot_download, dataset.name, revision=dataset.revision, allow_patterns=below, **kind)
        root = Path(dataset.ask(what, cached))
        paths = [path for path in (root / (dataset.folder or "")).rglob("*") if wanted(path.name)]
        return root.name, sorted(source_file(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths)
    commit = dataset.ask(what, partial(HfApi().repo_info, dataset.name, revision=dataset.revision, **kind)).sha
    ask_tree = partial(HfApi().list_repo_tree, dataset.name, dataset.folder, recursive=True, revision=commit, **kind)
    tree = dataset.ask(f"the files of {what}", lambda: list(ask_tree()), attempts=FEW_ATTEMPTS)
    return commit, sorted(file_of(entry) for entry in tree if isinstance(entry, RepoFile) and wanted(Path(entry.path).name))


def files_named(dataset: Dataset, commit: str, names: list[str]) -> list[SourceFile]:
    """The files of these names, in this order, as they are at `commit`. Raises UserError where one is not there."""
    from huggingface_hub import HfApi, RepoFile

    found: dict[str, SourceFile] = {}
    for i in range(0, len(names), PATHS_AT_A_TIME):
        paths = names[i : i + PATHS_AT_A_TIME]
        ask_paths = partial(HfApi().get_paths_info, dataset.name, paths, revision=commit, repo_type="dataset")
        entries = dataset.ask(f"the sizes of {len(names)} files", ask_paths)
        found |= {entry.path: file_of(entry) for entry in entries if isinstance(entry, RepoFile)}
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{dataset.where}: {missing[0]}: is not there at {commit}")
    return [found[name] for name in names]


def files_of_split(dataset: Dataset, config: str | None, split: str) -> tuple[str, list[SourceFile]]:
    """The commit and the files that `datasets` takes for a split of a dataset, in its order. Raises UserError.

    Where a script of the dataset says which they are, those into which the hub has converted it.
    """
    what = "no file or folder here has this name, and as a dataset on the hub"
    files = dataset.ask(what, partial(_data_files, dataset, config), attempts=FEW_ATTEMPTS)
    if files is None:
        return converted_files(dataset, config, split)
    if split not in files:
        raise UserError(f"{dataset.option} {dataset.where}: has no split {split!r}; --split takes one of {', '.join(files)}")
    commits, names = set(), []
    for url in files[split]:
        if not (match := re.fullmatch(rf"hf://datasets/{dataset.name}@([0-9a-f]{{40}})/(.+)", url)):
            raise UserError(f"{dataset.where}: its file {url} lies elsewhere; fetch it and give {dataset.option} local files")
        if not is_text(match[2]):
            raise UserError(f"{dataset.where}: {match[2]}: its name does not end in {SUFFIXES}")
        commits.add(match[1])
        names.append(match[2])
    (commit,) = commits
    return commit, files_named(dataset, commit, names)


def _data_files(dataset: Dataset, config: str | None) -> dict[str, list[str]] | None:
    """Addresses of the files of each split; None where a script would say it.

    Raises UserError for an unknown config, or one with options of a reader, as of a csv without a header.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    revision = None if dataset.revision == "main" else dataset.revision
    with TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(f"hf://datasets/{dataset.name}", config, revision=revision, cache_dir=cache)
        except (ValueError, RuntimeError) as error:
            if "scripts are no longer supported" in str(error):
                return None
            if not re.match("BuilderConfig|Config name", str(error)):
                raise
            said = one_line(error).partition(" Example of usage")[0]
            raise UserError(f"{dataset.option} {dataset.where}: {said}; --config takes one") from None
    files = {str(split): [str(file) for file in some] for split, some in (builder.config.data_files or {}).items()}
    if options := reader_options(builder.config, files):
        raise UserError(
            f"{dataset.where}: its files are to be read with {options}, which is not done here; fetch and convert them"
        )
    return files


def reader_options(config: Any, files: dict[str, list[str]]) -> str:  # datasets.BuilderConfig
    """What a dataset's card asks of the reader of its files beyond what their names say."""
    import datasets

    of_all = {field.name for field in dataclasses.fields(datasets.BuilderConfig)} | {"features", "columns", "batch_size"}
    usual = vars(type(config)())
    asked = {name: value for name, value in vars(config).items() if name not in of_all and value != usual[name]}
    if all(".tsv" in Path(file).suffixes[-2:] for some in files.values() for file in some):
        asked = {name: value for name, value in asked.items() if (name, value) != ("sep", "\t")}
    return ", ".join(f"{name} = {value!r}" for name, value in asked.items())


def converted_files(dataset: Dataset, config: str | None, split: str) -> tuple[str, list[SourceFile]]:
    """The commit and the parquet files into which the hub has converted a split: CONFIG/SPLIT/*.parquet. Raises UserError."""
    if dataset.revision != "main":
        raise UserError(
            f"{dataset.where}: a script says which files it has, and the hub has converted its newest revision only; leave out "
            f"@{dataset.revision}, or give {dataset.option} local files"
        )
    branch = Dataset(dataset.where, dataset.option, dataset.name, CONVERTED)
    commit, files = files_in_folder(branch, lambda name: name.endswith(".parquet"))
    splits: dict[tuple[str, str], list[SourceFile]] = {}
    for file in files:
        folder, _, rest = file.name.partition("/")
        splits.setdefault((folder, rest.rpartition("/")[0]), []).append(file)
    configs = sorted({folder for folder, _ in splits})
    chosen = config or (configs[0] if len(configs) == 1 else "")
    if (chosen, split) in splits:
        return commit, splits[chosen, split]
    part = f"hf://datasets/{dataset.name}@{CONVERTED}/{chosen}/partial-{split}"
    if (chosen, f"partial-{split}") in splits:
        raise UserError(f"{dataset.where}: the hub has converted only the beginning of it; {dataset.option} {part} takes that")
    if not splits:
        raise UserError(f"{dataset.where}: a script says which files it has, and the hub has not converted them")
    have = ", ".join(" ".join(key) for key in sorted(splits))
    raise UserError(f"{dataset.where}: no such config and split; --config and --split take one of {have}")


def file_of(entry: Any) -> SourceFile:  # huggingface_hub.RepoFile
    """A file as the hub tells it."""
    return source_file(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id)


def source_file(name: str, size: int, sha256: str | None = None, git_sha1: str | None = None) -> SourceFile:
    """A file of this name and size. Raises UserError for a name that would lead out of a folder, or is none everywhere."""
    if ".." in Path(name).parts or not name.isprintable() or set(name) & set(NO_NAMES):
        raise UserError(f"{name!r}: a file of this name cannot be fetched; rename it, or give local files")
    suffix = Path(name).suffix
    ratio = PARQUET_TEXT_RATIO if suffix == ".parquet" else COMPRESSED_TEXT_RATIO if suffix in COMPRESSED else 1
    return SourceFile(name, size, int(ratio * size), sha256, git_sha1)
