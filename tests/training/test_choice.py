"""Examples that a method chooses between epochs: the votes that it asks for, resume, and the order of the examples."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mnist
from rs_consistency import data, noise
from rs_consistency.cli import train
from rs_consistency.methods import METHODS
from rs_consistency.training import choice, loop, runs
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.inputs import make_order
from rs_consistency.training.step import create_state, restore_target
from tests.helpers import TOY, final_params
from tests.training.test_loop import assert_same_params, records

# Seven steps an epoch, and a checkpoint after every third. Hard examples are dropped after the first epoch.
SUN = [
    *TOY,
    "--config.method=sun",
    "--config.consistency.lbd=0",
    "--config.num_epochs=3",
    "--config.checkpoint_every_steps=3",
    "--config.checkpoint_keep=99",
    "--config.sun.discard_epoch=1",
    "--config.sun.weigh_every=1",
    "--config.sun.num_steps=1",
    "--config.num_devices=2",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sun") / "run"
    train.main([*SUN, f"--workdir={workdir}"])
    return workdir


def weights_at(workdir, step):
    """The weights in the checkpoint of a step."""
    copy = workdir.parent / f"at_{step}"
    shutil.copytree(workdir / "checkpoints" / str(step), copy / "checkpoints" / str(step))
    target = restore_target(runs.read_config(workdir), jax.devices()[:1], 200)
    _, state = Checkpoints(copy).restore_newest(target)
    shutil.rmtree(copy)
    return np.asarray(state.weights)


def test_examples_are_dropped_and_weighed(whole):
    kept = [record["examples"] for record in records(whole)]
    assert kept[0] == 200 and 20 < kept[1] < 200 and kept[2] == kept[1]
    np.testing.assert_array_equal(weights_at(whole, 7), np.ones(200))
    second, third = weights_at(whole, 9), weights_at(whole, 18)
    np.testing.assert_array_equal(second > 0, third > 0)
    assert (second > 0).sum() == kept[1] and (second != third).any() and len(set(second.tolist())) > 2


def test_the_weights_are_of_the_votes_of_the_model_that_the_epoch_begins_with(whole, tmp_path):
    """The share of right votes, by hand, from the checkpoint at the end of the first epoch."""
    shutil.copytree(whole, tmp_path / "run")
    for step in (path.name for path in (whole / "checkpoints").iterdir()):
        if int(step) > 7:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    run = runs.restore(tmp_path / "run", jax.devices()[:1])
    split = data.load("mnist", "train")
    apply_fn, variables = run.classifier()

    @jax.jit
    def votes(key, index, numbers):
        draws = jax.vmap(lambda number: jax.random.normal(noise.fold(key, index, 1, number), (28, 28, 1)))(numbers)
        image = jnp.asarray(split.images)[index] / jnp.float32(255)
        return apply_fn(variables, image[None] + 0.5 * draws).argmax(axis=-1)

    def accuracy(num_votes, asked):
        nonlocal calls
        calls += 1
        key = noise.fold(noise.stream_key(0, noise.Stream.CHOOSE), 1, calls)
        right = [(votes(key, index, np.arange(num_votes)) == split.labels[index]).mean() for index in range(200)]
        return np.where(asked, right, 0.0)

    calls = 0
    expected = METHODS["sun"].choose(run.config, 1, np.ones(200), accuracy)
    assert calls == 2
    np.testing.assert_allclose(weights_at(whole, 9), expected, rtol=1e-6)


def test_a_run_resumes_in_an_epoch_with_its_weights(program, whole, tmp_path, monkeypatch):
    workdir, chosen, step = tmp_path / "run", [], 9
    shutil.copytree(whole, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)

    def spy(choose, config, state, epoch, *args):
        chosen.append(epoch)
        return choice.choose_examples(choose, config, state, epoch, *args)

    monkeypatch.setattr(loop, "choose_examples", spy)
    program.succeeds("cli.train", *SUN, f"--workdir={workdir}")
    assert f"continuing after step {step}" in program.err
    assert chosen == [2]  # not again in the middle of an epoch
    assert_same_params(whole, workdir)
    np.testing.assert_array_equal(weights_at(workdir, 21), weights_at(whole, 21))


def test_the_number_of_devices_changes_the_choice_by_rounding_at_most(program, whole, tmp_path):
    workdir = tmp_path / "run"
    program.succeeds("cli.train", *SUN[:-1], "--config.num_devices=1", f"--workdir={workdir}")
    np.testing.assert_array_equal(weights_at(workdir, 18), weights_at(whole, 18))
    for one, other in zip(*map(jax.tree.leaves, map(final_params, (workdir, whole))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("weights", [np.zeros(5), np.full(5, np.nan), np.ones(4), -np.ones(5)])
def test_weights_that_are_none_are_refused(toy_trained, weights):
    run = runs.restore(toy_trained, jax.devices()[:1])
    state = create_state(run.config, 5).replace(weights=np.ones(5))
    split = data.Split(np.zeros((5, 28, 28, 1), np.uint8), np.zeros(5, np.int32))
    with pytest.raises(ValueError, match=r"method gaussian chose weights .*: give 5 finite numbers of at least 0"):
        choice.choose_examples(lambda *_: weights, run.config, state, 1, split, jax.devices()[:1])


def test_a_run_whose_number_of_examples_is_not_known_is_named(program, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    assert "3 images" in program.succeeds("cli.certify", f"--workdir={workdir}", "--n=50", "--n0=10", "--max=3").out
    (workdir / "data.json").unlink()
    error = program.fails("cli.certify", f"--workdir={workdir}", f"--output={tmp_path / 'c.tsv'}")
    assert f"{workdir / 'data.json'} does not say how many training examples the run has" in error


def test_the_order_of_an_epoch_follows_the_weights():
    order = make_order(mnist.get_config(), 50)
    plain = np.asarray(order(3, None))
    assert sorted(plain) == list(range(50))
    np.testing.assert_array_equal(order(3, np.full(50, 0.7)), plain)  # equal weights: every example once
    weights = (np.arange(50) % 5 == 0).astype(np.float32)
    drawn = np.asarray(order(3, weights))
    assert drawn.shape == (50,) and drawn.dtype == np.int32 and not (drawn % 5).any()
    np.testing.assert_array_equal(order(3, weights), drawn)
    assert (np.asarray(order(4, weights)) != drawn).any()


def test_runs_without_weights_have_none_in_their_checkpoints(toy_trained, whole):
    for workdir, step, has in ((toy_trained, 14, False), (whole, 21, True)):
        metadata = (workdir / "checkpoints" / str(step) / "default" / "_METADATA").read_text()
        assert ("weights" in metadata) == has
