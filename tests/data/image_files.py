"""Small pools and image files for the tests of the data layer."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayltr.data.images import digests
from rayltr.data.pool import Part, Pool


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pool_of(sizes: list[int], *, test: int = 2, val: int = 0, in_order: bool = False, seed: int = 0) -> Pool:
    """A pool with the given training images per class, rows mixed, and `test` and `val` images of every class."""
    parts = {"train": part_of(sizes, seed)}
    parts |= {"test": part_of([test] * len(sizes), seed + 1)} if test else {}
    parts |= {"val": part_of([val] * len(sizes), seed + 2)} if val else {}
    return Pool(tuple(f"c{c}" for c in range(len(sizes))), parts, (2, 2), in_order=in_order)


def part_of(sizes: list[int], seed: int) -> Part:
    target = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = noise((len(target), 2, 2, 3), seed)
    return Part(images, target, digests(images))


def write_folder(root: Path, images: np.ndarray, target: np.ndarray, classes: list[str], split: str = "train") -> None:
    for number, (pixels, c) in enumerate(zip(images, target, strict=True)):
        place = root / split / classes[c]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:04d}.png").write_bytes(png(pixels))


def write_parquet(
    path: Path, images: list, columns: dict[str, list], names: dict[str, list[str]] | None = None, group: int = 7
) -> None:
    """A shard as `datasets` writes it: `image` as struct<bytes, path>, integer columns, class names in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, **columns})
    features = {column: {"names": list(found), "_type": "ClassLabel"} for column, found in (names or {}).items()}
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


def encoded(images: np.ndarray) -> list[dict]:
    return [{"bytes": png(pixels), "path": f"{number}.png"} for number, pixels in enumerate(images)]
