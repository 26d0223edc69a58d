"""Where documents come from: a dataset on the Hugging Face hub, the demo's corpus, or local files."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from core.console import given_path
from core.errors import UserError
from text.corpus import IN_FOLDERS, SUFFIXES, Source, SourceFile, is_text, one_line, text_bytes

NAMED = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")  # OWNER/NAME[@REVISION]
TRASH = {"$RECYCLE.BIN", "lost+found", "__MACOSX", "@eaDir"}  # those of Unix begin with a dot
SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"  # in what a Dataset's and a DatasetDict's save_to_disk writes


def open_source(
    words: list[str],
    scratch: Path,
    revision: str | None = None,
    column: str = "text",
    config: str | None = None,
    split: str | None = None,
    names: list[str] | None = None,
) -> Source:
    """The source that --source's `words` name; fetched files lie in `scratch`, hub files are those of `revision`.

    `names` are the hub's files where an earlier start has asked for them. Raises UserError for a missing, empty or unreadable
    source; nothing is written yet.
    """
    if words == ["demo"] and (split or column != "text"):
        raise UserError("--source demo: has neither splits nor columns")
    named = is_hub(words) and not words[0].startswith("hf://")
    if config and not named:
        raise UserError(f"--config {config}: goes with --source OWNER/NAME, a dataset on the hub; {' '.join(words)} has none")
    if split and is_hub(words) and not named:
        raise UserError(f"--split {split}: goes with --source OWNER/NAME; {words[0]} is taken as a whole")
    if words == ["demo"]:
        from text.demo import DemoCorpus

        return DemoCorpus(scratch)
    if not is_hub(words):
        return LocalFiles(words, column, split)
    from text.hub import Dataset, HubFiles
    from text.listing import files_in_folder, files_named, files_of_split

    if not named:
        dataset = Dataset.at(words[0], revision=revision)
        commit, files = files_in_folder(dataset, lambda name: name.endswith(".parquet"))
    else:
        name, _, own = words[0].partition("@")
        dataset = Dataset(words[0], "--source", name, own)
        if revision and names:
            commit, files = revision, files_named(dataset, revision, names)
        else:
            commit, files = files_of_split(dataset, config, split or "train")
    if not files:
        raise UserError(f"--source {words[0]}: no parquet files there; OWNER/NAME alone takes a dataset's files of any kind")
    return HubFiles(dataset, commit, files, scratch)


def is_hub(words: list[str]) -> bool:
    """Whether --source's `words` are a dataset on the hub: an address, or OWNER/NAME where no file has this name."""
    if len(words) > 1:
        return False
    (word,) = words
    is_name = NAMED.fullmatch(word) and not os.path.lexists(word) and not is_text(word)
    return word.startswith("hf://") or bool(is_name)


class LocalFiles:
    """Files of text; a folder stands for the parquet, jsonl and txt files in it and in what it links to, sorted by name.

    What `datasets` saved with save_to_disk is such a folder, too: its files are those of its `split`.
    """

    revision, fetch_bytes = None, 0

    def __init__(self, words: list[str], column: str = "text", split: str | None = None) -> None:
        """Raises UserError for a missing, empty or unreadable one."""
        saved = [word for word in words if is_saved(Path(word))]
        if split and not any((Path(word) / SAVED_SPLITS).exists() for word in saved):
            raise UserError(f"--split {split}: has no meaning for {' '.join(words)}; local files are taken as a whole")
        self.paths = [path for word in words for path in (saved_files(word, split) if word in saved else find(word))]
        if column != "text" and all(".txt" in path.suffixes[-2:] for path in self.paths):
            raise UserError(f"--column {column}: has no meaning for {' '.join(words)}, which are taken as a whole")
        self.files = [SourceFile(str(path), path.stat().st_size, text_bytes(path, column)) for path in self.paths]

    def fetch(self, index: int) -> AbstractContextManager[Path]:
        """The file as it lies."""
        return nullcontext(self.paths[index])


def find(word: str) -> list[Path]:
    """The files that one word of --source stands for: a file, a folder or a pattern. Raises UserError."""
    path = Path(word)
    if path.is_dir():
        found = sorted(texts_below(path, {}))
    elif os.path.lexists(path):
        found = [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(word, recursive=True)) if not p.is_dir())
    if not found:
        raise UserError(
            f"--source {word}: no such file, and no folder or pattern with .parquet, .jsonl[.gz|.zst] or .txt[.gz|.zst] files "
            "in it (others by their names or a pattern, as 'texts/*.csv'); a dataset on the hub is OWNER/NAME, alone"
        )
    for path in found:
        given_path(str(path))
        if not path.is_file():
            what = "not a file" if path.exists() else "a link to what is not there"
            raise UserError(f"{path}: {what}; mend it or take it away")
        if not is_text(path.name):
            raise UserError(f"{path}: its name must end in {SUFFIXES}")
    return found


def is_saved(folder: Path) -> bool:
    """Whether it is what `datasets` writes with save_to_disk."""
    return (folder / SAVED_SPLITS).is_file() or ((folder / SAVED).is_file() and (folder / "state.json").is_file())


def saved_files(folder: str, split: str | None) -> list[Path]:
    """The arrow files of a Dataset, or of one split of a DatasetDict, in their order. Raises UserError."""
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # of pyarrow, of json, of datasets
        raise UserError(f"{folder}: is no whole folder of save_to_disk ({one_line(error)})") from None
    if isinstance(saved, dict):
        if (split := split or "train") not in saved:
            raise UserError(f"--source {folder}: has no split {split!r}; --split takes one of {', '.join(saved)}")
        saved = saved[split]
    if not saved.cache_files:
        raise UserError(f"--source {folder}: holds no rows")
    return [Path(one["filename"]) for one in saved.cache_files]


def texts_below(folder: Path, above: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """What is named as text in a folder and, links followed, in those below it; what is hidden, or thrown away, is passed over.

    `above` are the folders on the way here. Raises UserError for a link back to one of them, and for what cannot be read.
    """
    try:
        here, entries = folder.stat(), list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    key = (here.st_dev, here.st_ino)
    if key in above:
        raise UserError(f"{folder}: a link back to {above[key]}, which would be read for ever; take it away")
    for entry in entries:
        if entry.name[0] == "." or entry.name in TRASH:
            continue
        if entry.is_dir():
            yield from texts_below(folder / entry.name, above | {key: folder})
        elif IN_FOLDERS.search(entry.name) or not (folder / entry.name).exists():  # what a link leads to may have been text
            yield folder / entry.name
