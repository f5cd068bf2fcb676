"""`python -m rayltr.predict DIR IMAGE|FOLDER|FILE.parquet`: an exported model or ensemble on images."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayltr import command, studies
from rayltr.command import Refused
from rayltr.data.folders import images_in
from rayltr.data.images import Files, Items, decode_all
from rayltr.data.parquets import shards_of

CHUNK = 256
SHOWN = 20


def parser() -> argparse.ArgumentParser:
    made = command.Parser(prog="rayltr predict", description="Use an exported model on images.")
    made.add_argument("model", metavar="DIR", help="an exported model or ensemble")
    made.add_argument("images", metavar="IMAGE|FOLDER|FILE.parquet", help="what to classify")
    made.add_argument("--out", metavar="FILE.parquet", help="write path, prediction and probabilities of every class")
    made.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    made.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    folder = Path(options.model)
    several = (folder / "ensemble.json").is_file()
    if not several and not (folder / "config.json").is_file():
        raise ValueError(f"{options.model} is no exported model: it has no config.json")
    if options.out and Path(options.out).suffix != ".parquet":
        raise ValueError(f"--out {options.out} is no .parquet file, which is what is written")
    items = found(Path(options.images))
    for file in [*folder.glob("study.py"), *folder.glob("members/*/study.py")][:1]:  # they are all the same
        studies.find(str(file))  # its backbone may be the user's own
    shipping = import_module("rayltr.shipping")  # torch, only now that there is something to classify
    command.usable(options.device)
    device = shipping.place(options.device)
    model, config = (import_module("rayltr.ensemble") if several else shipping).opened(folder, device)
    size = tuple(config["pretrained_cfg"]["input_size"][1:])
    kept: list[int] = []
    batches = decoded(items, size, options.skip_corrupt, kept)
    parts = [*shipping.predictions(model, batches, device)]
    if not parts:
        raise Refused(f"no image at {options.images} can be read")
    probabilities = np.concatenate(parts)
    names = [items.name(row) for row in kept]
    show(names, probabilities, config["label_names"])
    if options.out:
        write(Path(options.out), names, probabilities, config["label_names"])
    if len(kept) < len(items):
        print(f"{len(items) - len(kept)} images cannot be read and are left out", file=sys.stderr)
    return 0


def found(path: Path) -> Items:
    """The images at a path.  Raises ValueError when there are none."""
    if path.suffix == ".parquet" and path.is_file():
        return shards_of(path)
    if path.is_file():
        return Files([str(path)])
    items = Files(sorted(images_in(str(path))))
    if not len(items):
        raise ValueError(f"there is no image at {path}")
    return items


def decoded(items: Items, size: tuple[int, int], skip: bool, kept: list[int]) -> Iterator[np.ndarray]:
    """uint8 [B,H,W,3], sized as in training; `kept` collects the positions of the images that can be read."""
    for start in range(0, len(items), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(items)))
        images = decode_all(items.read(rows), size[0] if size[0] == size[1] else None)
        readable = [(row, image) for row, image in zip(rows.tolist(), images, strict=True) if image is not None]
        if len(readable) < len(rows) and not skip:
            bad = next(row for row, image in zip(rows.tolist(), images, strict=True) if image is None)
            raise Refused(f"{items.name(bad)} cannot be read as an image; --skip-corrupt leaves such images out")
        other = [items.name(row) for row, image in readable if image.shape[:2] != size]
        if other:  # only sets whose images all have one small size are not square
            raise Refused(f"{other[0]} is not {size[1]} x {size[0]} pixels, as the images of the training set")
        kept.extend(row for row, _ in readable)
        if readable:
            yield np.stack([image for _, image in readable])


def show(names: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]) -> None:
    """Prints the three likeliest classes of the first images."""
    for name, row in list(zip(names, probabilities, strict=True))[:SHOWN]:
        best = [f"{classes[c]} {100 * row[c]:.1f} %" for c in np.argsort(-row)[:3]]
        print(f"{name}: {', '.join(best)}")
    if len(names) > SHOWN:
        print(f"... and {len(names) - SHOWN} more")


def write(path: Path, names: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]) -> None:
    """Columns path, prediction (class name), probability, probabilities [C]; class names in the schema metadata."""
    best = probabilities.argmax(1)
    flat = pa.array(probabilities.astype(np.float32).ravel())
    table = pa.table({
        "path": pa.array(names),
        "prediction": pa.array([classes[c] for c in best]),
        "probability": pa.array(probabilities.max(1).astype(np.float32)),
        "probabilities": pa.FixedSizeListArray.from_arrays(flat, probabilities.shape[1]),
    }, metadata={"classes": "\n".join(classes)})  # fmt: skip
    try:
        pq.write_table(table, path)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error}") from error
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(command.run(main))
