"""Images with classes: sources by name, long-tailed subsets, and splits whose identity is their content.

NumPy, Pillow and pyarrow only, so that the driver starts fast; nothing here imports torch.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace

from rayltr.data.folders import folder
from rayltr.data.images import decode
from rayltr.data.lists import list_files
from rayltr.data.longtail import PROFILES, long_tail_counts
from rayltr.data.parquets import parquet
from rayltr.data.pool import Data, Pool, Split
from rayltr.data.recognise import recognise
from rayltr.data.sources import cifar10, cifar100, digits, synthetic
from rayltr.data.splits import subset
from rayltr.spec import Fn, dump

__all__ = ["PROFILES", "SOURCES", "Data", "Pool", "Split", "decode", "load", "long_tail_counts", "recognise", "subset"]

SOURCES: dict[str, Callable[..., Pool]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": folder,
    "parquet": parquet,
    "list": list_files,
    "synthetic": synthetic,
}


def load(source: Fn) -> Data:
    """The data that `fn(SOURCE, **keywords)` means: keywords of the source function and of `subset` together.

    Raises ValueError for an unknown source or keyword, a missing keyword, and whatever makes the data unusable.
    """
    if source.name not in SOURCES:
        raise ValueError(f"there is no source {source.name!r}; {_nearest(source.name, SOURCES)}")
    make = SOURCES[source.name]
    own, common = inspect.signature(make).parameters, list(inspect.signature(subset).parameters)[1:]
    given = dict(source.keywords)
    if unknown := [name for name in given if name not in own and name not in common]:
        raise ValueError(f"source {source.name} has no keyword {unknown[0]!r}; {_nearest(unknown[0], [*own, *common])}")
    if missing := [name for name, found in own.items() if found.default is found.empty and name not in given]:
        raise ValueError(f"source {source.name} needs the keyword {missing[0]!r}")
    pool = make(**{name: value for name, value in given.items() if name in own})
    data = subset(pool, **{name: value for name, value in given.items() if name not in own})
    return replace(data, manifest={"source": dump(source), **data.manifest})


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"There are: {', '.join(known)}"
