import importlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rayltr.data import SOURCES, load, long_tail_counts
from rayltr.data.sources import cifar10, cifar100, digits, synthetic
from rayltr.spec import fn
from tests.data.image_files import noise


def everything(split):
    return split.take(np.arange(len(split)))


def test_digits_are_scaled_and_held_out(monkeypatch):
    pool = digits()
    images = pool.parts["train"].images
    assert images.shape == (1797, 8, 8, 3) and (images.min(), images.max()) == (0, 255)
    assert (images[..., 0] == images[..., 2]).all()
    monkeypatch.setattr(importlib, "import_module", None)  # from now on scikit-learn is not needed
    data = load(fn("digits"))
    assert data.counts.sum() + len(data.val) + len(data.unseal()) == 1797
    assert data.classes == tuple("0123456789")


def cifar_batch(seed: int, classes: int, key: str, each: int) -> dict:
    target = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), each)).tolist()
    return {"data": noise((len(target), 3072), seed), key: target, "filenames": ["x.png"] * len(target)}


def write_cifar(root, classes: int, each: int) -> None:
    if classes == 10:
        folder, meta, names, key = "cifar-10-batches-py", "batches.meta", "label_names", "labels"
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    else:
        folder, meta, names, key = "cifar-100-python", "meta", "fine_label_names", "fine_labels"
        files = ["train", "test"]
    (root / folder).mkdir()
    (root / folder / meta).write_bytes(pickle.dumps({names: [f"class {c}" for c in range(classes)]}, protocol=2))
    for seed, file in enumerate(files):
        (root / folder / file).write_bytes(pickle.dumps(cifar_batch(seed, classes, key, each), protocol=2))


def test_cifar10_is_read_from_its_batches_in_order(tmp_path):
    write_cifar(tmp_path, 10, 3)
    pool = cifar10(root=str(tmp_path), download=False)
    train = pool.parts["train"]
    assert (len(train.target), len(pool.parts["test"].target), pool.size) == (150, 30, (32, 32))
    batch = cifar_batch(1, 10, "labels", 3)
    assert train.target[30:60].tolist() == batch["labels"]
    # Batches hold the red, green and blue plane one after the other.
    np.testing.assert_array_equal(train.images[31, 5, 7], batch["data"][1].reshape(3, 32, 32)[:, 5, 7])


def test_long_tailed_cifar100_is_the_published_subset(tmp_path):
    write_cifar(tmp_path, 100, 20)
    data = load(fn("cifar100", root=str(tmp_path), ratio=10, paper_split=True))
    target = np.array(cifar_batch(0, 100, "fine_labels", 20)["fine_labels"])
    counts, published = long_tail_counts(20, 100, 10), []
    np.random.seed(0)
    for c in range(100):
        found = np.where(target == c)[0]
        np.random.shuffle(found)
        published += found[: counts[c]].tolist()
    assert sorted(data.manifest["rows"]["train"]) == sorted(published)
    assert data.counts.tolist() == counts
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2023, 0.1994, 0.2010)


def test_cifar_needs_no_torchvision_once_its_files_are_there(tmp_path, cache_folder, monkeypatch):
    (cache_folder / "cifar100").mkdir()
    write_cifar(cache_folder / "cifar100", 100, 1)
    monkeypatch.setattr(importlib, "import_module", None)
    assert cifar100().classes[99] == "class 99"


def test_absent_cifar_is_downloaded_or_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not hold the Python batches of CIFAR10, and download is off"):
        cifar10(root=str(tmp_path), download=False)

    class Offline:
        @staticmethod
        def CIFAR100(root, download):
            raise OSError("no route to host")

    monkeypatch.setattr(importlib, "import_module", lambda name: Offline)
    with pytest.raises(ValueError, match="CIFAR100 could not be downloaded .no route to host.: root= names a folder"):
        cifar100(root=str(tmp_path))


def test_a_batch_cannot_run_code(tmp_path):
    write_cifar(tmp_path, 100, 1)
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": subprocess.run}))
    with pytest.raises(ValueError, match="a CIFAR batch does not contain subprocess.run"):
        cifar100(root=str(tmp_path))


def test_synthetic_images_are_the_same_every_time():
    one, two, other = synthetic(), synthetic(), synthetic(seed=1)
    np.testing.assert_array_equal(one.parts["train"].images, two.parts["train"].images)
    assert (one.parts["train"].images != other.parts["train"].images).mean() > 0.9
    assert one.parts["train"].images.shape == (1000, 16, 16, 3) and len(one.parts["test"].target) == 200
    assert len({bytes(found) for found in one.parts["train"].digests}) == 1000


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_synthetic_images_can_be_learnt(classes):
    """The nearest class mean tells most test images, so a network can."""
    pool = synthetic(classes=classes, per_class=20, test_per_class=5)
    train, test = pool.parts["train"], pool.parts["test"]
    means = np.stack([train.images[train.target == c].mean(0).ravel() for c in range(classes)])
    flat = test.images.reshape(len(test.target), -1).astype(float)
    distance = (means**2).sum(1) - 2 * flat @ means.T
    assert (distance.argmin(1) == test.target).mean() > 0.7


def test_synthetic_without_a_test_split():
    assert list(synthetic(test_per_class=0).parts) == ["train"]
    with pytest.raises(ValueError, match="at least 2 classes"):
        synthetic(classes=1)


def test_load_names_what_exists():
    with pytest.raises(ValueError, match="no source 'cifar_100'; did you mean 'cifar100'. There are: digits, cifar10"):
        load(fn("cifar_100"))
    with pytest.raises(
        ValueError, match="digits has no keyword 'ration'; did you mean 'ratio'. There are: ratio, prof"
    ):
        load(fn("digits", ration=100))
    with pytest.raises(ValueError, match="source digits has no keyword 'root'"):
        load(fn("digits", root="/"))
    with pytest.raises(ValueError, match="source list needs the keyword 'train'"):
        load(fn("list", root="/"))


def test_load_writes_the_source_into_the_manifest():
    data = load(fn("synthetic", ratio=10, classes=4))
    assert data.manifest["source"] == {"fn": "synthetic", "ratio": 10, "classes": 4}
    assert len(data.digest) == 64


def test_the_table_has_the_public_names():
    assert list(SOURCES) == ["digits", "cifar10", "cifar100", "folder", "parquet", "list", "synthetic"]


def test_the_data_layer_imports_neither_torch_nor_scikit_learn():
    code = "import rayltr.data, sys; print(sorted({'torch', 'sklearn', 'ray', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
