"""ImageNet as a stream: order, augmentation, evaluation decoding, worker processes, and what is said of damage."""

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from rs_consistency import UserError
from rs_consistency.data import crops, streaming
from tests.helpers import CTRL_C_WORKS, ROOT, encode, write_imagenet

SIDE = 16
# 30 training images in batches of 8: the last of an epoch's 4 batches lacks two.
STEPS = {"batch_size": 8, "steps_per_epoch": 4}


def coordinates(width, height):
    """A JPEG file whose red is the column and whose green is the row, both from 0 to 255."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    image = np.stack(np.broadcast_arrays(across[None, :], down[:, None], 128.0), -1)
    return encode(np.rint(image).astype(np.uint8), "JPEG", quality=100, subsampling=0)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder with 30 training and 12 validation images of 40 x 60 to 300 x 200; labels are all different."""
    folder = tmp_path_factory.mktemp("imagenet")
    sizes = [(40 + 9 * i, 60 + 5 * i) if i % 2 else (60 + 8 * i, 40 + 5 * i) for i in range(30)]
    train = [coordinates(*size) for size in sizes]
    write_imagenet(folder, {"train": (train, 33 * np.arange(30)), "validation": (train[:12], np.arange(988, 1000))})
    return folder


def opened(folder, split="train", side=SIDE, num_classes=1000):
    return streaming.open_split(
        "imagenet2012", split, str(folder), image_shape=(side, side, 3), num_classes=num_classes
    )


def train(split, num_steps, *, seed=3, first_step=0, num_workers=0, **steps):
    with streaming.training_batches(
        split, seed=seed, first_step=first_step, num_steps=num_steps, num_workers=num_workers, **(steps or STEPS)
    ) as batches:
        return list(batches)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(batches, expected, strict=True):
        assert type(images) is type(labels) is np.ndarray
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


def test_an_epoch_is_a_permutation_filled_up_from_its_start(imagenet):
    split = opened(imagenet)
    assert len(split) == 30
    labels = np.concatenate([labels for _, labels in train(split, 12)]).reshape(3, 32)
    for epoch in labels:
        assert sorted(epoch[:30]) == list(range(0, 990, 33))
        assert epoch[30:].tolist() == epoch[:2].tolist()
    assert len({tuple(epoch) for epoch in labels}) == 3
    other_seed = np.concatenate([labels for _, labels in train(split, 4, seed=4)])
    assert other_seed.tolist() != labels[0].tolist()


def test_an_example_is_augmented_anew_in_each_epoch_and_place(imagenet):
    batches = train(opened(imagenet), 8)
    images, labels = (
        np.concatenate(arrays).reshape(2, 32, *arrays[0].shape[1:]) for arrays in zip(*batches, strict=True)
    )
    again = [np.flatnonzero(labels[1, :30] == label)[0] for label in labels[0, :30]]
    assert (images[0, :30] != images[1, again]).any(axis=(1, 2, 3)).all()
    assert (images[0, :2] != images[0, 30:]).any(axis=(1, 2, 3)).all()  # the same examples, filled up


def test_the_order_and_the_draws_stay_what_they_are():
    # A run that is resumed with another version of NumPy goes on with the same data.
    assert crops.permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    np.testing.assert_allclose(crops.uniform(-1, 2, 3)[[0, 22]], [0.9917504371432901, 0.06514813088321347], rtol=1e-12)


def test_batches_depend_neither_on_the_workers_nor_on_the_start(imagenet, monkeypatch, capsys):
    split = opened(imagenet)
    expected = train(split, 9)
    for first_step in (1, 4, 7, 9, 10):
        assert_same(train(split, 9, first_step=first_step), expected[first_step:])

    batches = streaming.training_batches(split, seed=3, first_step=2, num_steps=9, num_workers=2, **STEPS)
    assert_same([next(batches) for _ in range(5)], expected[2:7])
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    start = time.monotonic()
    batches.close()  # with two batches to go
    assert not any(process.is_alive() for process in processes) and not multiprocessing.active_children()
    assert time.monotonic() - start < 20  # Grain kills a worker after 25 seconds
    assert list(batches) == []
    batches.close()
    assert capsys.readouterr().err == ""

    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000))
    assert_same(train(split, 9, num_workers=1), expected)
    assert "note: /dev/shm has 0 MiB free" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def measured_crops(split, num_steps):
    """Widths and heights of the crops as shares of the image's, and flips, seen in images of coordinates."""
    images = np.concatenate([images for images, _ in train(split, num_steps, batch_size=50, steps_per_epoch=1)])
    side = images.shape[1]
    # The outermost pixels see the border; between them the colors rise by the crop's share / side per pixel.
    inner = images[:, 2:-2, 2:-2].astype(float)
    pixels = inner.shape[1] - 1
    across = (inner[:, :, -1, 0] - inner[:, :, 0, 0]).mean(1) * side / pixels / 255
    down = (inner[:, -1, :, 1] - inner[:, 0, :, 1]).mean(1) * side / pixels / 255
    return np.abs(across), down, across < 0


def expected_area():
    """The mean share of the area of crops of a square image.

    Area a, uniform, and t = |log ratio|, uniform in 0..log 4/3, are drawn until the crop fits, that is a <= exp(-t):
    the mean is the integral of (exp(-2t) - 0.08^2) / 2 over that of exp(-t) - 0.08.
    """
    end = math.log(4 / 3)
    above = ((1 - math.exp(-2 * end)) / 2 - 0.08**2 * end) / 2
    return above / (1 - math.exp(-end) - 0.08 * end)


@pytest.mark.parametrize("broken", [False, True])
def test_crops_and_flips_are_distributed_as_they_should(tmp_path, monkeypatch, broken):
    write_imagenet(tmp_path, {"train": ([coordinates(200, 200)] * 3, np.zeros(3))}, num_shards=1)
    if broken:  # the smaller crops left out, as some recipes do: the tolerances below must notice it
        monkeypatch.setattr(crops, "_AREA", (0.2, 1.0))
    width, height, flipped = measured_crops(opened(tmp_path, side=32), 40)
    n = len(width)
    assert n == 2000
    area, ratio = width * height, np.log(width / height)
    # The colors' rounding and the crop's make single widths uncertain by 1%. Means may be four standard errors off.
    area_is_right = abs(area.mean() - expected_area()) < 4 * area.std() / math.sqrt(n) + 0.003
    assert area_is_right != broken
    assert broken or 0.075 < area.min() < 0.1
    assert 0.95 < area.max() < 1.02
    assert abs(ratio.mean()) < 4 * ratio.std() / math.sqrt(n) + 0.002
    assert np.abs(ratio).max() < math.log(4 / 3) + 0.05
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_an_image_that_no_crop_fits_gives_its_largest_central_one():
    draws = np.linspace(0, 0.99, crops.DRAWS)
    assert crops.crop_box(1000, 10, draws) == (493, 0, 13, 10)
    assert crops.crop_box(10, 1000, draws) == (0, 493, 10, 13)
    assert crops.crop_box(1, 1, draws) == (0, 0, 1, 1)


def test_a_crop_of_everything_is_the_whole_image():
    draws = np.full(crops.DRAWS, 0.999999)
    draws[10:20] = 0.5  # ratio 1
    assert crops.crop_box(100, 100, draws) == (0, 0, 100, 100)


def triangle_weights(before, after):
    """`[after, before]`: bilinear with antialiasing, from its definition."""
    scale = before / after
    centers = (np.arange(after) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(before) + 0.5 - centers[:, None]) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (61, 97), (40, 40), (20, 30)])
def test_evaluation_decoding_resizes_the_shorter_side_and_takes_the_center(tmp_path, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stored = encode(noise, "JPEG")
    write_imagenet(tmp_path, {"validation": ([stored], [7])}, num_shards=1)
    images, labels = opened(tmp_path, "validation", side=32).read([0])
    assert images.shape == (1, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [7] and labels.dtype == np.int32

    pixels = np.asarray(Image.open(io.BytesIO(stored)), float)
    short = 37  # 32 * 256 / 224
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    resized = np.einsum("yh,hwc,xw->yxc", triangle_weights(height, high), pixels, triangle_weights(width, wide))
    top, left = round((high - 32) / 2), round((wide - 32) / 2)
    # PIL rounds after each of the two directions.
    np.testing.assert_allclose(images[0], resized[top : top + 32, left : left + 32], atol=1.1)


def test_evaluation_batches_are_all_examples_in_order(imagenet):
    split = opened(imagenet, "validation")
    with streaming.evaluation_batches(split, batch_size=5, num_workers=0) as batches:
        batches = list(batches)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    images, labels = split.read(range(12))
    assert labels.tolist() == list(range(988, 1000))
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), images)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), labels)
    some_images, some_labels = split.read(np.array([7, 0, 7]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Image, "open", None)  # labels are read without decoding
        np.testing.assert_array_equal(split.read_labels(np.array([7, 0, 7])), some_labels)
    np.testing.assert_array_equal(some_images, images[[7, 0, 7]])
    assert some_labels.tolist() == [995, 988, 995]
    assert split.read([])[0].shape == (0, SIDE, SIDE, 3)
    with pytest.raises(IndexError, match=r"example 12 is outside 0\.\.11"):
        split.read([12])


def test_grey_and_cmyk_images_become_rgb(tmp_path):
    files = [
        encode(Image.new("L", (50, 40), 100), "JPEG"),
        encode(Image.new("CMYK", (50, 40), (0, 255, 255, 0)), "JPEG"),
        encode(Image.new("RGB", (50, 40), (0, 0, 255)), "PNG"),  # ImageNet has a PNG file, too
    ]
    write_imagenet(tmp_path, {"train": (files, [0, 1, 2])})
    split = opened(tmp_path)
    colors = [[100, 100, 100], [255, 0, 0], [0, 0, 255]]
    for index, color in enumerate(colors):
        np.testing.assert_allclose(split.read([index])[0].reshape(-1, 3) - np.array(color), 0, atol=2)
    for images, labels in train(split, 3, batch_size=1, steps_per_epoch=3):
        np.testing.assert_allclose(images.reshape(-1, 3) - np.array(colors[labels[0]]), 0, atol=2)


def test_batches_made_ahead_are_few(imagenet, monkeypatch):
    decoded, lock = [], threading.Lock()
    decode = streaming.StreamedSplit.decode

    def count(self, index, fit):
        with lock:
            decoded.append(index)
        return decode(self, index, fit)

    monkeypatch.setattr(streaming.StreamedSplit, "decode", count)
    with streaming.training_batches(
        opened(imagenet), seed=0, first_step=0, num_steps=1000, num_workers=0, **STEPS
    ) as batches:
        next(batches)
        time.sleep(0.5)
        # Taken, taken ahead, and one per thread.
        assert len(decoded) <= (2 + streaming._THREADS) * STEPS["batch_size"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_example_is_named(tmp_path, num_workers):
    files = [coordinates(60, 50)] * 12
    files[7] = files[7][: len(files[7]) // 2]
    write_imagenet(tmp_path, {"train": (files, np.arange(12))})
    split = opened(tmp_path)
    message = (
        r"^imagenet2012 \(train\): example 7 is unreadable: .*truncated.*; move .*5\.1\.0 away and prepare it again$"
    )
    batches = streaming.evaluation_batches(split, batch_size=4, num_workers=num_workers)
    assert next(batches)[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=message):
        next(batches)
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match=message):
        split.read([3, 7])


def test_damage_to_the_folder_is_named(tmp_path, imagenet):
    folder = tmp_path / "copy"
    shutil.copytree(imagenet, folder)
    home = folder / "imagenet2012" / "5.1.0"
    (second,) = home.glob("*train*-00001-*")
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"imagenet2012 \(train\): example 20 is unreadable"):
        opened(folder).read([20])
    second.unlink()
    with pytest.raises(UserError, match=r"-00001-of-00002 is missing; .*cli\.prepare imagenet2012"):
        opened(folder)
    (home / "features.json").write_text("{")
    with pytest.raises(UserError, match=r"is unreadable: .*cli\.prepare imagenet2012"):
        opened(folder)


def test_what_cannot_be_opened_is_said_with_the_remedy(tmp_path, imagenet):
    with pytest.raises(UserError, match=r"'imagenet2012' is not prepared in .*cli\.prepare imagenet2012 --data_dir="):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"has no split 'test'; use one of train, validation$"):
        opened(imagenet, "test")
    with pytest.raises(UserError, match=r"image_shape=\(28, 28, 1\) cannot be streamed; use \(S, S, 3\)"):
        streaming.open_split("imagenet2012", "train", str(imagenet), image_shape=(28, 28, 1), num_classes=1000)
    folder = tmp_path / "copy"
    shutil.copytree(imagenet, folder)
    path = folder / "imagenet2012" / "5.1.0" / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"stored as tfrecord, and only array_record .*another folder: .*--data_dir="):
        opened(folder)


def test_labels_outside_their_range_are_named(imagenet):
    split = opened(imagenet, num_classes=900)
    with pytest.raises(UserError, match=r"\(train\): label 924 of example 28 is outside 0\.\.899"):
        split.read([0, 28])
    with pytest.raises(UserError, match=r"label 9\d\d of example 2\d is outside 0\.\.899"):
        train(split, 4)


def test_the_digest_is_of_the_data_alone(tmp_path, imagenet):
    original = opened(imagenet).digest()
    assert len(original) == 64 and original != opened(imagenet, "validation").digest()
    folder = tmp_path / "elsewhere"
    shutil.copytree(imagenet, folder)
    home = folder / "imagenet2012" / "5.1.0"
    for path in home.iterdir():
        os.utime(path, (1, 1))
    assert opened(folder, side=32).digest() == original
    info = home / "dataset_info.json"
    info.write_text(info.read_text() + "\n")
    assert opened(folder).digest() != original
    shutil.copy(imagenet / "imagenet2012" / "5.1.0" / "dataset_info.json", info)
    assert opened(folder).digest() == original
    (first,) = home.glob("*train*-00000-*")
    first.write_bytes(first.read_bytes() + b"\0")
    assert opened(folder).digest() != original


def test_all_shards_may_be_open(monkeypatch):
    limits = []
    monkeypatch.setattr(streaming.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(streaming.resource, "setrlimit", lambda _, pair: limits.append(pair))
    for needed in (1000, 1536, 9000):
        streaming._allow_open_files(needed)
    assert limits == [(1536, 4096), (4096, 4096)]


SCRIPT = """
import sys
from rs_consistency.data import crops, streaming

if __name__ == "__main__":
    split = streaming.open_split("imagenet2012", "train", sys.argv[1], image_shape=(16, 16, 3), num_classes=1000)
    with streaming.training_batches(
        split, seed=0, batch_size=8, steps_per_epoch=4, first_step=0, num_steps=10**6, num_workers=2
    ) as batches:
        for step, _ in enumerate(batches):
            if step == 3:
                print("running", flush=True)
"""


def test_ctrl_c_ends_a_script_and_its_workers_quietly(imagenet, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [*CTRL_C_WORKS, sys.executable, script, imagenet],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "running\n", process.communicate()
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all of them
        # The pipe ends when the last process that could write to it has ended.
        err = process.communicate(timeout=60)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert err.count("Traceback") == err.count("KeyboardInterrupt") == 1, err
    assert "Warning" not in err
