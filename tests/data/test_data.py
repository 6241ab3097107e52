"""Datasets: the embedded one, prepared TFDS folders, the cache, and what is said when one is not there."""

import json
import shutil
import sys
import time

import numpy as np
import pytest

from rs_consistency import UserError, data
from rs_consistency.data import prepare, tfds
from tests.helpers import write_tfds


def test_the_embedded_subset_is_the_start_of_the_original_files():
    train, test = data.load("mnist_subset", "train"), data.load("mnist_subset", "test")
    assert train.images.shape == (10_000, 28, 28, 1) and test.images.shape == (1_000, 28, 28, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(train.labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    # The first training image, a five, has 166 pixels that are not black.
    assert (train.images[0] > 0).sum() == 166


def test_unit_images_are_float32_between_0_and_1():
    unit = data.to_unit(np.array([0, 51, 255], np.uint8))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [0, 0.2, 1], rtol=1e-6)


def test_a_prepared_folder_is_read_in_order_without_tensorflow(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 30)
    write_tfds(tmp_path, "cifar10", "3.0.2", {"train": (images, labels), "test": (images[:5], labels[:5])})
    split = data.load("cifar10", "train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)
    assert "tensorflow" not in sys.modules


def test_the_second_load_comes_from_the_cache_and_a_changed_folder_does_not(tmp_path, monkeypatch):
    images, labels = np.zeros((4, 28, 28, 1), np.uint8), np.arange(4)
    write_tfds(tmp_path, "mnist", "3.0.1", {"train": (images, labels), "test": (images, labels)})
    cache = tmp_path / "cache"
    first = data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(cache))

    decode = tfds._decode
    monkeypatch.setattr(tfds, "_decode", lambda *_: pytest.fail("decoded again"))
    second = data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(cache))
    np.testing.assert_array_equal(first.images, second.images)

    monkeypatch.setattr(tfds, "_decode", decode)
    shutil.rmtree(tmp_path / "mnist")
    write_tfds(tmp_path, "mnist", "3.0.1", {"train": (images + 9, labels), "test": (images, labels)})
    assert data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(cache)).images[0, 0, 0, 0] == 9


def test_a_damaged_cache_is_made_again(tmp_path):
    images, labels = np.full((4, 28, 28, 1), 3, np.uint8), np.arange(4)
    write_tfds(tmp_path, "mnist", "3.0.1", {"train": (images, labels), "test": (images, labels)})
    cache = tmp_path / "cache"
    data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(cache))
    (cached,) = cache.iterdir()
    for damaged in (b"", cached.read_bytes()[:500]):
        cached.write_bytes(damaged)
        split = data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(cache))
        np.testing.assert_array_equal(split.images, images)
    assert cached.stat().st_size > 500


def test_an_unwritable_cache_costs_a_note_only(tmp_path, capsys):
    images, labels = np.zeros((4, 28, 28, 1), np.uint8), np.arange(4)
    write_tfds(tmp_path, "mnist", "3.0.1", {"train": (images, labels), "test": (images, labels)})
    (tmp_path / "file").touch()
    data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "file" / "cache"))
    assert "note: decoded images are not cached" in capsys.readouterr().err


def test_the_newest_version_is_read(tmp_path):
    for version, value in {"3.0.9": 1, "3.0.10": 2}.items():
        images = np.full((2, 28, 28, 1), value, np.uint8)
        write_tfds(tmp_path, "mnist", version, {"train": (images, np.arange(2)), "test": (images, np.arange(2))})
    assert data.load("mnist", "test", data_dir=str(tmp_path), cache_dir=str(tmp_path / "c")).images.max() == 2


def test_datasets_of_another_name_in_tfds_keep_ours_in_messages(tmp_path):
    images, labels = np.zeros((3, 32, 32, 3), np.uint8), np.arange(3)
    write_tfds(tmp_path, "svhn_cropped", "3.1.0", {"train": (images, labels)})
    assert data.load("svhn", "train", data_dir=str(tmp_path)).labels.tolist() == [0, 1, 2]
    for name in ("svhn", "imagenet", "cifar100"):
        with pytest.raises(
            UserError, match=rf"dataset.name='{name}' is not prepared .*cli\.prepare {name} --data_dir="
        ):
            data.open_split(name, "test", data_dir=str(tmp_path / "nothing"))
        assert name in prepare.ORIGINALS
    with pytest.raises(UserError, match="split='validation' is unknown; use one of train, test"):
        data.open_split("imagenet", "validation")


def test_a_dataset_that_is_not_prepared_is_told_at_once_with_the_command(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'fashion_mnist' is not prepared in .*prepare fashion_mnist --data_dir="):
        data.load("fashion_mnist", "train", data_dir=str(tmp_path))
    assert time.monotonic() - start < 5


def test_unknown_names():
    with pytest.raises(
        UserError,
        match=r"dataset.name='minst' is unknown; use one of cifar10, cifar100, fashion_mnist, imagenet, mnist",
    ):
        data.load("minst", "train")
    with pytest.raises(UserError, match="split='valid' is unknown; use one of train, test"):
        data.load("mnist_subset", "valid")


def test_tfrecord_without_tensorflow_names_both_ways_out(tmp_path, monkeypatch):
    images = np.zeros((2, 28, 28, 1), np.uint8)
    home = write_tfds(tmp_path, "mnist", "3.0.1", {"train": (images, np.arange(2)), "test": (images, np.arange(2))})
    info = json.loads((home / "dataset_info.json").read_text())
    (home / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"only TensorFlow reads.*pip install tensorflow-cpu.*cli\.prepare mnist --data_dir="
    ):
        data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"is already prepared, as tfrecord.*give another --data_dir"):
        prepare.prepare("mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("damage", ["truncate", "remove", "info"])
def test_a_damaged_folder_is_named(tmp_path, damage):
    images = np.zeros((20, 28, 28, 1), np.uint8)
    labels = np.arange(20) % 10
    home = write_tfds(tmp_path, "mnist", "3.0.1", {"train": (images, labels), "test": (images, labels)})
    (record,) = home.glob("*train*")
    if damage == "truncate":
        record.write_bytes(record.read_bytes()[:100])
    elif damage == "remove":
        record.unlink()
    else:
        (home / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"is unreadable.*move"):
        data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_labels_outside_their_range_are_named(tmp_path):
    images = np.zeros((3, 28, 28, 1), np.uint8)
    write_tfds(tmp_path, "mnist", "3.0.1", {s: (images, np.array([1, 10, 2])) for s in ("train", "test")})
    with pytest.raises(UserError, match=r"label 10 of example 1 is outside 0\.\.9"):
        data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_images_of_another_shape_are_named(tmp_path):
    images = np.zeros((3, 32, 32, 3), np.uint8)
    write_tfds(tmp_path, "mnist", "3.0.1", {s: (images, np.arange(3)) for s in ("train", "test")})
    with pytest.raises(UserError, match=r"images are uint8 \(3, 32, 32, 3\); expected uint8 \[N, \(28, 28, 1\)\]"):
        data.load("mnist", "train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_prepare_says_what_is_missing_within_seconds(program, monkeypatch, tmp_path):
    assert "cannot be prepared; use one of mnist" in program.fails("cli.prepare", "mnist_subset")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tensorflow-cpu" in program.fails("cli.prepare", "mnist")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "manual_dir=/nowhere is not a folder" in program.fails(
        "cli.prepare", "mnist", "--manual_dir=/nowhere", f"--data_dir={tmp_path}"
    )
    assert f"manual_dir={tmp_path} lacks train-images" in program.fails(
        "cli.prepare", "mnist", f"--manual_dir={tmp_path}"
    )
    monkeypatch.setattr("tensorflow_datasets.builder", lambda *args, **settings: (_ for _ in ()).throw(AssertionError))
    monkeypatch.setattr(prepare, "_check_network", lambda name: None)
    assert "'svhn' could not be prepared: AssertionError; try again" in program.fails(
        "cli.prepare", "svhn", f"--data_dir={tmp_path}"
    )
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "ILSVRC2012_img_val.tar (image-net.org), and give their folder with --manual_dir" in program.fails(
        "cli.prepare", "imagenet", f"--data_dir={tmp_path}"
    )
    assert "lacks ILSVRC2012_img_train.tar" in program.fails(
        "cli.prepare", "imagenet", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}"
    )
    monkeypatch.setitem(prepare.ORIGINALS, "mnist", prepare.Original("http://127.0.0.1:9/nothing", ()))
    assert "out of reach (ConnectionError)" in program.fails("cli.prepare", "mnist", f"--data_dir={tmp_path}")


def test_what_is_prepared_needs_nothing(program, tfds_dir):
    assert f"prepared {tfds_dir}/mnist/3.0.1" in program.succeeds("cli.prepare", "mnist", f"--data_dir={tfds_dir}").out


def test_the_digest_names_images_and_labels():
    split = data.Split(np.zeros((2, 2, 2, 1), np.uint8), np.array([0, 1], np.int32))
    assert split.digest() == data.Split(split.images.copy(), split.labels.copy()).digest()
    assert split.digest() != data.Split(split.images + 1, split.labels).digest()
    assert split.digest() != data.Split(split.images, split.labels[::-1]).digest()
