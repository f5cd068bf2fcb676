"""What kind of source a path is."""

from pathlib import Path

from rayltr.data.folders import images_in, splits_of, subfolders
from rayltr.data.ingest import folder_of, split_in
from rayltr.data.parquets import parquet_files
from rayltr.spec import Fn, fn

SUPPORTED = "a Parquet file or a folder of them, a folder of class folders (or train/, test/ with class folders), \
or a folder with lists such as train.txt and test.txt or train.json"


def recognise(path: str | Path) -> Fn:
    """The source that a path on disk is: `parquet`, `list` or `folder` with an absolute root.

    Raises ValueError if nothing is there or it is none of these.
    """
    root = folder_of(str(path))
    if root.is_file():
        if root.suffix.lower() == ".parquet":
            return fn("parquet", root=str(root))
    elif parquet_files(root):
        return fn("parquet", root=str(root))
    elif lists := _lists(root):
        return fn("list", root=str(root), **lists)
    elif _has_class_folders(root):
        return fn("folder", root=str(root))
    raise ValueError(f"{root} is no data set that is known here: {SUPPORTED}")


def _lists(root: Path) -> dict[str, str]:
    """The lists in a folder by split, text before JSON; a lone val beside train is the test."""
    for suffix, fits in (".txt", _is_text_list), (".json", _is_annotation):
        files = [path for path in sorted(root.iterdir()) if path.suffix.lower() == suffix and path.is_file()]
        named = [(split, path) for path in files if (split := split_in(path.stem)) and fits(path)]
        lists = {split: path.name for split, path in named}
        if len(lists) < len(named):
            names = ", ".join(path.name for _, path in named)
            raise ValueError(f"{root} has several lists for one split ({names}): name them in a source of your own")
        if "train" in lists:
            return {"train": lists["train"], "test": lists["val"]} if set(lists) == {"train", "val"} else lists
    return {}


def _is_text_list(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        name, _, target = next((line for line in file if line.strip()), "").strip().rpartition(" ")
    return bool(name) and target.isdecimal()


def _is_annotation(path: Path) -> bool:
    return b'"annotations"' in path.read_bytes()  # the lists of unpublished test targets have none


def _has_class_folders(root: Path) -> bool:
    train = splits_of(root)["train"]
    return any(next(iter(images_in(entry.path)), None) for entry in subfolders(train))
