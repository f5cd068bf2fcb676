"""The real CIFAR-100, where it is at hand."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayltr.data import load, long_tail_counts
from rayltr.spec import fn
from tests.conftest import CIFAR100

pytestmark = [pytest.mark.data, pytest.mark.skipif(not CIFAR100.exists(), reason="no CIFAR-100 here")]
TAIL = {"ratio": 100.0, "paper_split": True}


def written(root: Path) -> Path:
    """The Parquet files as an image folder: split/class/number.png."""
    for file in sorted(CIFAR100.glob("*.parquet")):
        table = pq.read_table(file)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names, split = features["fine_label"]["names"], file.name.split("-")[0]
        for name in names:
            (root / split / name).mkdir(parents=True)
        for row, (image, target) in enumerate(
            zip(table["img"].to_pylist(), table["fine_label"].to_pylist(), strict=True)
        ):
            (root / split / names[target] / f"{row:05d}.png").write_bytes(image["bytes"])
    return root


@pytest.mark.slow
def test_parquet_and_the_folder_written_from_it_are_the_same_data(tmp_path):
    parquet = load(fn("parquet", root=str(CIFAR100), **TAIL))
    folder = load(fn("folder", root=str(written(tmp_path)), **TAIL))
    assert parquet.counts.tolist() == long_tail_counts(500, 100, 100.0) and parquet.counts.sum() == 10_847
    assert folder.digest == parquet.digest
    assert folder.manifest["hashes"] == parquet.manifest["hashes"]
    assert (folder.train.take(range(100)) == parquet.train.take(range(100))).all()


def test_the_images_are_the_ones_in_the_file():
    data = load(fn("parquet", root=str(CIFAR100), **TAIL))
    table = pq.read_table(CIFAR100 / "train-00000-of-00001.parquet", columns=["img", "fine_label"])
    for position in (0, 5000, 10_846):
        row = table.slice(data.manifest["rows"]["train"][position], 1).to_pylist()[0]
        assert row["fine_label"] == data.train.target[position]
        image = Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")
        assert image.tobytes() == data.train.take([position])[0].tobytes()
