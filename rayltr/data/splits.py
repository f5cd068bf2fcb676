"""From a pool to the training, validation and test images of a trial, and the record of how they came about."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayltr.data import cache, protocols
from rayltr.data.longtail import Rows, long_tail_counts
from rayltr.data.pool import Data, Pool, Split, content_digest, split_of

NEEDS = {
    "official": "a source with its own val split",
    "surplus": "a ratio, which leaves images over",
    "cv": "training images",
    "holdout": "training images",
}
"""The validation protocols in the order of preference, and what each needs."""
SAMPLE, CHUNK = 10_000, 256
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Cut:
    """Rows of the pool's training part, per class: as drawn, and what of them trains, validates and tests.

    `val` and `test` are None where the source's own split is used; `wanted` is what surplus asks of every class.
    """

    drawn: Rows
    train: Rows
    val: Rows | None = None
    test: Rows | None = None
    wanted: int = 0


def subset(
    pool: Pool,
    *,
    ratio: float | None = None,
    profile: str = "exponential",
    imbalance_seed: int = 0,
    validation: str | None = None,
    paper_split: bool = False,
    split_seed: int = 0,
    fold: int = 0,
    test_fraction: float = 0.2,
) -> Data:
    """The training, validation and test split of a pool.

    With `ratio` (largest/smallest class, at least 1) a long tail of the given `profile` is drawn with
    `imbalance_seed` (0 on CIFAR: the published subset).  A pool without a test split first loses `test_fraction` of
    every class to one.  `validation` is

    - "official": the source's own val split (automatic where there is one);
    - "surplus": 20 to 200 images per class that the draw left over (automatic with `ratio`).  A class with too few
      left gives up training images, unless `paper_split` keeps the published training set as it is;
    - "cv": fold `fold` of five, at most 20 images per class, taken from the training images (automatic otherwise);
    - "holdout": a fifth of every class of at least 5 images, at most 20.

    Raises ValueError for an unknown or impossible protocol, an impossible ratio and a class without training images.
    """
    settings: dict[str, Any] = {
        "validation": _protocol(pool, ratio, validation, paper_split, fold),
        "imbalance_seed": imbalance_seed,
        "split_seed": split_seed,
        "fold": fold,
        "paper_split": paper_split,
    }
    settings |= {} if "test" in pool.parts else {"test_fraction": test_fraction}
    settings |= {} if ratio is None else {"ratio": ratio, "profile": profile}
    return _data(pool, _cut(pool, settings), settings)


def _cut(pool: Pool, settings: dict[str, Any]) -> Cut:
    whole = protocols.by_class(pool.parts["train"], len(pool.classes), pool.in_order)
    if empty := [name for name, rows in zip(pool.classes, whole, strict=True) if not len(rows)]:
        raise ValueError(f"no training image in class {_some(empty)}")
    test, seed = None, settings["split_seed"]
    if "test_fraction" in settings:
        whole, test = protocols.hold_out_test(whole, settings["test_fraction"], "ratio" in settings, seed)
    drawn, left, smallest = whole, whole, min(map(len, whole))
    if "ratio" in settings:
        counts = long_tail_counts(smallest, len(whole), settings["ratio"], settings["profile"])
        drawn, left = protocols.draw(whole, counts, settings["imbalance_seed"])
    if settings["validation"] == "official":
        return Cut(drawn, drawn, test=test)
    if settings["validation"] == "surplus":
        wanted = protocols.surplus_size(len(whole), smallest)
        return Cut(drawn, *protocols.surplus(drawn, left, wanted, settings["paper_split"], seed), test, wanted)
    chosen = protocols.fold_of(settings["fold"]) if settings["validation"] == "cv" else protocols.share
    return Cut(drawn, *protocols.carve(drawn, chosen, seed), test)


def _protocol(pool: Pool, ratio: float | None, validation: str | None, paper_split: bool, fold: int) -> str:
    """The validation protocol in use.  Raises ValueError for one that is unknown or impossible here."""
    fits = {"official": "val" in pool.parts, "surplus": ratio is not None, "cv": True, "holdout": True}
    possible = [name for name in NEEDS if fits[name]]
    protocol = validation or possible[0]
    if protocol not in NEEDS:
        raise ValueError(f"there is no validation protocol {protocol!r}; protocols: {', '.join(NEEDS)}")
    if protocol not in possible:
        raise ValueError(f"validation {protocol} needs {NEEDS[protocol]}; possible here: {', '.join(possible)}")
    if paper_split and protocol in ("cv", "holdout"):
        raise ValueError(
            f"paper_split needs a ratio: validation {protocol} takes training images, paper_split keeps all"
        )
    if not 0 <= fold < protocols.FOLDS or (fold and protocol != "cv"):
        raise ValueError(
            f"fold {fold} does not exist: folds are 0 to {protocols.FOLDS - 1}, and only with validation cv"
        )
    return protocol


def _data(pool: Pool, cut: Cut, settings: dict[str, Any]) -> Data:
    shipped = {name: np.flatnonzero(part.target >= 0) for name, part in pool.parts.items()}
    carved = {"train": cut.train, "val": cut.val, "test": cut.test}
    part_names = {name: name if rows is None else "train" for name, rows in carved.items()}
    splits = {
        name: split_of(pool.parts[part_names[name]], shipped[name] if rows is None else np.concatenate(rows))
        for name, rows in carved.items()
    }
    if not len(splits["val"]):
        raise ValueError(f"validation {settings['validation']} needs classes with more images")
    digests = {name: pool.parts[part_names[name]].digests[split.rows] for name, split in splits.items()}
    mean, std = pool.normal or _normal(splits["train"], digests["train"])
    frame = {"classes": pool.classes, "mean": mean, "std": std, "size": pool.size}
    return Data(
        classes=pool.classes,
        train=splits["train"],
        val=splits["val"],
        _test=splits["test"],
        counts=_counts(pool, splits["train"]),
        mean=mean,
        std=std,
        size=pool.size,
        digest=content_digest(frame, [(split.target, digests[name]) for name, split in splits.items()]),
        manifest=_manifest(pool, cut, settings, splits, digests, part_names),
    )


def _counts(pool: Pool, split: Split) -> np.ndarray:
    return np.bincount(split.target, minlength=len(pool.classes)).astype(np.int64)


def _normal(split: Split, digests: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of at most 10 000 evenly spaced images, pixels in [0, 1]."""
    rows = np.arange(0, len(split), -(-len(split) // SAMPLE))
    if not split.lazy:
        return _moments(split, rows)
    # Decoding ten thousand images takes minutes, so the result is kept, named by the content of these images.
    name = cache.key("normal", {"images": hashlib.sha256(digests[rows].tobytes()).hexdigest()})
    _, meta = cache.remembered(name, lambda sink: {"normal": _moments(split, rows)})
    mean, std = meta["normal"]
    return tuple(mean), tuple(std)


def _moments(split: Split, rows: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    total, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(rows), CHUNK):
        images = split.take(rows[start : start + CHUNK])
        lines = images.reshape(-1, images.shape[2] * 3).astype(np.float64)
        total += lines.sum(0).reshape(-1, 3).sum(0)
        squares += np.einsum("ij,ij->j", lines, lines).reshape(-1, 3).sum(0)
    pixels = len(rows) * images.shape[1] * images.shape[2]
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return _rounded(mean), tuple(value or 1.0 for value in _rounded(std))  # a constant channel is not scaled


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value) / 255, 6) for value in values)


def _manifest(
    pool: Pool,
    cut: Cut,
    settings: dict[str, Any],
    splits: dict[str, Split],
    digests: dict[str, np.ndarray],
    part_names: dict[str, str],
) -> dict[str, Any]:
    counts = {name: _counts(pool, split) for name, split in splits.items()}
    missing = {name: [c for c, n in zip(pool.classes, counts[name], strict=True) if not n] for name in ("val", "test")}
    given_up = {} if not cut.wanted else _differences(pool, cut.drawn, cut.train)
    return {
        "protocol": settings,
        "imbalance_seed": settings["imbalance_seed"],
        "counts": counts["train"].tolist(),
        "images": {name: len(split) for name, split in splits.items()},
        "hashes": {name: _set_hash(found) for name, found in digests.items()},
        "taken_from": part_names,
        "rows": {name: split.rows.tolist() for name, split in splits.items()},
        "reduced": given_up,
        "unmeasured": missing["val"],
        "skipped": {"count": len(pool.skipped), "first": list(pool.skipped[:SHOWN])},
        "warnings": _warnings(pool, cut, settings, counts["val"], given_up, missing["test"]),
    }


def _differences(pool: Pool, before: Rows, after: Rows) -> dict[str, int]:
    return {name: len(a) - len(b) for name, a, b in zip(pool.classes, before, after, strict=True) if len(a) != len(b)}


def _set_hash(digests: np.ndarray) -> str:
    return hashlib.sha256(b"".join(sorted(map(bytes, digests)))).hexdigest()


def _warnings(
    pool: Pool, cut: Cut, settings: dict[str, Any], val: np.ndarray, given_up: dict[str, int], untested: list[str]
) -> list[str]:
    short = [f"{name} ({n})" for name, n in zip(pool.classes, val, strict=True) if n < cut.wanted]
    lines = {
        f"{len(pool.skipped)} images cannot be read and are left out": pool.skipped,
        "the source has no test split: one was held out of its training images": cut.test,
        "the val split of the source is not used": cut.val and "val" in pool.parts,
        f"training images given up so that every class has {cut.wanted} for validation: "
        + _some([f"class {name} gave {n}" for name, n in given_up.items()]): given_up,
        f"fewer than {cut.wanted} validation images: {_some(short)}": short,
        "tail estimate unreliable: classes of fewer than 5 images are not validated": settings["validation"]
        == "holdout",
        f"no test image of {_some(untested)}": untested,
    }
    return [*pool.notes, *(line for line, holds in lines.items() if holds)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
