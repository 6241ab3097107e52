"""Training and certification of a streamed dataset: a small generated ImageNet, in the format of the real one."""

import functools
import json
import shutil
import textwrap

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rs_consistency import data, models, noise
from rs_consistency.data import DATASETS
from rs_consistency.models.cifar_resnet import CifarResNet
from rs_consistency.training import inputs
from rs_consistency.training.checkpoints import Checkpoints, digest
from rs_consistency.training.stream_inputs import StreamInputs
from tests.helpers import ROOT, encode, final_params, kill_when, rows, start, write_imagenet

NUM_TRAIN, NUM_TEST = 22, 7
# 32 x 32 pixels instead of 224 x 224, and the smallest ResNet in the place of resnet50; all else is as in the real run.
SMALL = DATASETS["imagenet"]._replace(image_shape=(32, 32, 3))
SMALL_RESNET = functools.partial(CifarResNet, depth=8)
# 8 examples in a step of 16 noisy images: 3 steps in an epoch.
CONFIG = [
    f"--config={ROOT}/configs/imagenet.py",
    "--config.batch_size=16",
    "--config.num_epochs=2",
    "--config.eval_batch_size=3",
    "--config.checkpoint_every_steps=2",
    "--config.dataset.num_workers=0",
    "--config.num_devices=2",
]


@pytest.fixture(scope="module", autouse=True)
def small_imagenet(tfds_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    rng, splits = np.random.default_rng(0), {}
    for name, count in {"train": NUM_TRAIN, "validation": NUM_TEST}.items():
        sizes = rng.integers(40, 120, (count, 2))
        images = [encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8), "JPEG") for size in sizes]
        splits[name] = images, rng.integers(0, 1000, count)
    write_imagenet(folder, splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        patch.setitem(DATASETS, "imagenet", SMALL)
        patch.setitem(models.MODELS, "resnet50", SMALL_RESNET)
        yield folder


@pytest.fixture(scope="module")
def finished(small_imagenet, tmp_path_factory):
    from rs_consistency.cli import train

    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.main([*CONFIG, f"--workdir={workdir}"])
    return workdir


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "noisy_images_per_second"} for line in lines]


def test_a_streamed_run_trains_evaluates_and_saves_within_an_epoch(finished):
    assert [record["step"] for record in records(finished)] == [3, 6]
    last = records(finished)[-1]
    assert np.isfinite(last["loss"])
    assert last["noisy_test_accuracy"] * NUM_TEST == pytest.approx(round(last["noisy_test_accuracy"] * NUM_TEST))
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [3, 4, 6]


def test_a_run_that_stopped_within_an_epoch_goes_on_exactly(program, finished, tmp_path, monkeypatch):
    # As after a kill behind the checkpoint of step 4, the first of the second epoch.
    stop, kept = tmp_path / "run", 4

    def interrupt(self, step, state):
        original(self, step, state)
        if step == kept:
            self.wait()
            raise KeyboardInterrupt

    original = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupt)
        assert "interrupted" in program.fails("cli.train", *CONFIG, f"--workdir={stop}")
    program.succeeds("cli.train", *CONFIG, f"--workdir={stop}")
    assert f"continuing after step {kept}" in program.err
    assert digest(final_params(stop)) == digest(final_params(finished))
    # The losses of the second epoch are means over the steps of the process that ended it.
    means = ("loss", "cross_entropy", "consistency")
    whole, part = records(finished), records(stop)
    assert all(np.isfinite(part[1][name]) and part[1].pop(name) != whole[1].pop(name) for name in means)
    assert part == whole


def test_a_killed_run_with_workers_goes_on_to_the_same_parameters(program, finished, small_imagenet, tmp_path):
    # A program of its own, since the workers import it: the same small model and images as here. Behind its first
    # checkpoint, within the first epoch, it waits for the kill, while its workers go on.
    script = tmp_path / "small_train.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        if __name__ == "__main__":
            import time
            from rs_consistency.cli import train
            from tests.training import test_imagenet as small
            def save_and_wait(self, step, state):
                save(self, step, state)
                self.wait()
                time.sleep(600)
            save, small.Checkpoints.save = small.Checkpoints.save, save_and_wait
            small.DATASETS["imagenet"] = small.SMALL
            small.models.MODELS["resnet50"] = small.SMALL_RESNET
            train.main(sys.argv[1:])
        """)
    )
    command = [*CONFIG, "--config.eval_every_epochs=2", f"--workdir={tmp_path / 'run'}"]
    process = start(script, *command, "--config.dataset.num_workers=2", cwd=tmp_path)
    kill_when(process, (tmp_path / "run" / "checkpoints" / "2").is_dir)
    program.succeeds("cli.train", *command, "--config.dataset.num_workers=1")  # which computes the same
    assert "continuing after step 2" in program.err
    assert digest(final_params(tmp_path / "run")) == digest(final_params(finished))


def test_the_number_of_devices_changes_rounding_alone(program, tmp_path, monkeypatch):
    # In two parts: which examples meet which noise. Without batch norm, which magnifies rounding. The model would be
    # computed in pieces, which the host does not know of.
    monkeypatch.setattr(models, "QUICK_IN_LOOPS", {"linear"})
    monkeypatch.setattr("rs_consistency.training.step.pieces_of", lambda *_: 2)
    workdirs = {count: tmp_path / str(count) for count in (1, 2)}
    for count, workdir in workdirs.items():
        command = [*CONFIG, "--config.accumulate_steps=2", "--config.num_epochs=1", "--config.model=linear"]
        program.succeeds("cli.train", *command, f"--config.num_devices={count}", f"--workdir={workdir}")
    one, two = (records(workdir)[0] for workdir in workdirs.values())
    for name in ("cross_entropy", "consistency", "loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(final_params(workdir)) for workdir in workdirs.values()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums in another order


def test_the_host_cuts_a_batch_as_the_devices_number_it():
    config = ConfigDict({"accumulate_steps": 2, "batch_size": 16, "num_noise": 2})
    stream = StreamInputs(config, range(24), range(1), devices=jax.devices()[:2])
    assert stream.sizes == (8, 3)
    feed = stream._divide(np.arange(8), np.arange(8))
    assert np.asarray(feed.parts["images"]).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert inputs.part_positions(2, stream.sizes, 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_a_streamed_run_is_certified(program, finished, tmp_path):
    command = ["cli.certify", f"--workdir={finished}", "--n=40", "--n0=5", "--skip=2", "--batch_size=32"]
    program.succeeds(*command, f"--output={tmp_path / 'a.tsv'}")
    program.succeeds(*command, "--max=2", f"--output={tmp_path / 'b.tsv'}")
    program.succeeds(*command, f"--output={tmp_path / 'b.tsv'}")
    assert rows(tmp_path / "a.tsv") == rows(tmp_path / "b.tsv")
    split = data.open_split("imagenet", "test")
    indices = np.arange(0, NUM_TEST, 2)
    assert [int(row[0]) for row in rows(tmp_path / "a.tsv")[1:]] == indices.tolist()
    assert [int(row[1]) for row in rows(tmp_path / "a.tsv")[1:]] == split.read(indices)[1].tolist()
    assert json.loads((tmp_path / "a.json").read_text())["data_digest"] == split.digest()


def test_evaluation_counts_every_streamed_image(finished):
    # The accuracy of the record, from the images and the noise of their addresses one by one.
    from rs_consistency.training import runs
    from rs_consistency.training.step import make_model

    run = runs.restore(finished, jax.devices()[:1])
    images, labels = data.open_split("imagenet", "test").read(range(NUM_TEST))
    key = noise.stream_key(run.config.seed, noise.Stream.EVAL)
    draws = np.stack([jax.random.normal(noise.fold(key, i), SMALL.image_shape) for i in range(NUM_TEST)])
    noisy = images / np.float32(255) + run.config.sigma * draws
    logits = jax.jit(make_model(run.config).apply)(run.variables, noisy)
    assert records(finished)[-1]["noisy_test_accuracy"] == np.mean(logits.argmax(axis=-1) == labels)


def test_what_cannot_be_streamed_is_told(program, finished, tmp_path):
    for method, more in {
        "catrs": [f"--config.catrs.teacher={finished}"],
        "sun": ["--config.sun.discard_epoch=1"],
    }.items():
        command = [f"--config.method={method}", *more, f"--workdir={tmp_path / 'run'}"]
        error = program.fails("cli.train", *CONFIG, *command)
        assert not (tmp_path / "run").exists()
        assert f"method='{method}' counts votes on every training image, and dataset imagenet is streamed" in error
    with pytest.raises(ValueError, match="dataset 'imagenet' is too large for arrays; read it with open_split"):
        data.load("imagenet", "train")
    shutil.copytree(finished, tmp_path / "copy")
    error = program.fails("cli.certify", f"--workdir={tmp_path / 'copy'}", f"--data_dir={tmp_path}")
    assert f"dataset.name='imagenet' is not prepared in {tmp_path}" in error
