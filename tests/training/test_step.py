"""The training step: what it computes, and that devices and interruptions do not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import default, mnist
from rs_consistency import data, losses, methods, models, noise
from rs_consistency.data import DATASETS
from rs_consistency.data.augment import AUGMENTATIONS
from rs_consistency.devices import parallel
from rs_consistency.methods import smoothadv
from rs_consistency.methods.base import Method, MethodOutput
from rs_consistency.models.cifar_resnet import CifarResNet
from rs_consistency.training.array_inputs import ArrayInputs
from rs_consistency.training.inputs import make_order, step_sizes
from rs_consistency.training.step import compile_steps, create_state, make_model, make_schedule
from tests.training.normalized import Normalized

NUM_EXAMPLES = 40
SHAPE = (28, 28, 1)


def small_config(**changes) -> FrozenConfigDict:
    config = mnist.get_config()
    config.update({"batch_size": 32, "eval_batch_size": 16, **changes})
    return FrozenConfigDict(config)


@functools.cache
def examples():
    split = data.load("mnist_subset", "train")
    return data.Split(split.images[:NUM_EXAMPLES], split.labels[:NUM_EXAMPLES])


@functools.cache
def first_state(config):
    """The initial state, as copies: a step takes the buffers of a state."""
    return jax.tree.map(np.array, create_state(config))


def run_steps(config, num_devices, num_steps=5, extra=None, steps_per_call=1):
    devices = jax.devices()[:num_devices]
    inputs = ArrayInputs(config, examples(), examples(), devices=devices, extra=extra or {})
    steps = compile_steps(config, inputs, per_call=steps_per_call)
    state = parallel.replicate(jax.tree.map(jnp.array, first_state(config)), devices)
    history, step = [], 0
    while step < num_steps:
        in_epoch = inputs.sizes.steps - step % inputs.sizes.steps
        number = min(steps_per_call, num_steps - step, in_epoch)
        (feed,) = inputs.feeds(step, step + 1)
        state, metrics = steps.train(state, np.int32(number), *feed.args, **feed.parts)
        assert {len(values) for values in metrics.values()} == {steps_per_call}
        history += [jax.tree.map(lambda values, i=i: np.asarray(values)[i], metrics) for i in range(number)]
        step += number
    return jax.device_get(state), history


steps_once = functools.cache(run_steps)  # for what several tests compare with


def reference_steps(config, num_steps):
    """Take the steps on one device, copy by copy, with gradients of the plain mean and PyTorch's SGD written out."""
    num_noise, batch = config.num_noise, config.batch_size // config.num_noise
    steps = -(-NUM_EXAMPLES // batch)
    model = make_model(config)
    params = first_state(config).params
    momentum = jax.tree.map(jnp.zeros_like, params)
    key = noise.stream_key(config.seed, noise.Stream.TRAIN)
    draw = jax.jit(lambda *address: jax.random.normal(noise.fold(key, *address), SHAPE))

    @jax.jit
    def loss_and_gradient(params, noisy, labels):
        def loss_fn(params):
            logits = jnp.stack([model.apply({"params": params}, copy, train=True) for copy in noisy])
            loss = losses.cross_entropy(logits, labels)
            if config.consistency.lbd:
                loss = loss + losses.consistency(logits, lbd=config.consistency.lbd, eta=config.consistency.eta)
            return loss.mean()

        return jax.value_and_grad(loss_fn)(params)

    history = []
    for i in range(num_steps):
        order = make_order(config, NUM_EXAMPLES)(i // steps)
        chosen = [int(order[(i % steps * batch + j) % NUM_EXAMPLES]) for j in range(batch)]
        images, labels = examples().images[chosen] / np.float32(255), examples().labels[chosen]
        noisy = [images + config.sigma * jnp.stack([draw(i, j, m) for j in range(batch)]) for m in range(num_noise)]
        loss, grads = loss_and_gradient(params, noisy, labels)
        lr = config.optimizer.lr * config.optimizer.lr_gamma ** (i // (steps * config.optimizer.lr_step_size))
        grads = jax.tree.map(lambda g, p: g + config.optimizer.weight_decay * p, grads, params)
        momentum = jax.tree.map(lambda m, g: config.optimizer.momentum * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m, lr=lr: p - lr * m, params, momentum)
        history.append(float(loss))
    return params, history


def assert_close(one, other, atol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# The published settings, a rapid schedule so that five steps pass two epochs and a drop of the learning rate, and a
# weight decay that would show if it were decoupled from the gradient or left out.
FAST = {"optimizer": {"lr": 0.05, "lr_step_size": 1, "weight_decay": 0.05}}
GAUSSIAN = {"num_noise": 1, "consistency": {"lbd": 0.0}}
FOUR_COPIES = {"num_noise": 4, "consistency": {"lbd": 2.0, "eta": 0.1}}


@pytest.mark.parametrize(
    "changes",
    [{}, GAUSSIAN, FOUR_COPIES],
    ids=["consistency", "gaussian", "four copies"],
)
def test_steps_equal_the_reference(changes):
    config = small_config(**changes, **FAST)
    state, history = steps_once(config, 1)
    params, reference = reference_steps(config, 5)
    np.testing.assert_allclose([step["loss"] for step in history], reference, rtol=1e-4)
    assert_close(state.params, params, atol=1e-5)  # float32 rounding of five steps
    moved = first_state(config).params
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, moved)), strict=True)) > 5e-3
    assert int(state.step) == 5


@pytest.mark.parametrize(("num_devices", "steps_per_call"), [(1, 2), (2, 4)])
def test_steps_in_one_call_are_the_steps_one_by_one(num_devices, steps_per_call):
    config = small_config(**FAST)
    one, one_history = steps_once(config, num_devices)
    other, history = run_steps(config, num_devices, steps_per_call=steps_per_call)
    assert int(other.step) == 5
    assert_close(one_history, history, atol=1e-4)  # compiled in another way: as for devices
    assert_close(one.params, other.params, atol=2e-6)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_devices_do_not_change_the_training(num_devices):
    config = small_config(**FAST)
    one, one_history = steps_once(config, 1)
    many, many_history = steps_once(config, num_devices)
    assert_close(one.params, many.params, atol=2e-6)  # sums in another order
    np.testing.assert_allclose(
        [step["loss"] for step in one_history], [step["loss"] for step in many_history], rtol=1e-5
    )


def test_metrics_name_the_terms_of_the_loss():
    _, (metrics, *_) = steps_once(small_config(**FAST), 8)
    assert set(metrics) == {"loss", "cross_entropy", "consistency", "param_norm"}
    assert metrics["loss"] == pytest.approx(metrics["cross_entropy"] + metrics["consistency"], rel=1e-5)
    _, (metrics, *_) = steps_once(small_config(**GAUSSIAN, **FAST), 1)
    assert set(metrics) == {"loss", "cross_entropy", "param_norm"}


def test_a_seed_is_a_training_of_its_own():
    losses_of = [run_steps(small_config(model="linear", seed=seed), 1, 2)[1][1]["loss"] for seed in (0, 0, 1)]
    assert losses_of[0] == losses_of[1] != losses_of[2]


def test_the_published_steps():
    config = mnist.get_config()
    assert step_sizes(config, 60_000) == (128, 469)  # M = 2: 256 noisy images of 128 examples
    gaussian = mnist.get_config("method=gaussian")
    assert step_sizes(gaussian, 60_000) == (256, 235)


def test_the_order_is_a_permutation_by_seed_and_epoch():
    order = make_order(default.get_config(), 1000)
    first, again, second = np.asarray(order(0)), np.asarray(order(0)), np.asarray(order(1))
    assert sorted(first) == list(range(1000))
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.9
    config = default.get_config()
    config.seed = 1
    assert (np.asarray(make_order(config, 1000)(0)) != first).mean() > 0.9


def test_the_learning_rate_drops_by_epochs():
    never = small_config(optimizer={"lr_step_size": 10**9})
    assert float(make_schedule(never, steps_per_epoch=469)(10**6)) == pytest.approx(0.01)
    schedule = make_schedule(mnist.get_config(), steps_per_epoch=469)
    for epoch, lr in {0: 1e-2, 29: 1e-2, 30: 1e-3, 59: 1e-3, 60: 1e-4, 89: 1e-4}.items():
        for step in (469 * epoch, 469 * epoch + 468):
            assert float(schedule(step)) == pytest.approx(lr, rel=1e-5)


@functools.cache
def correct_predictions():
    """The number of correct predictions of the initial linear model, from the noise of every image's address."""
    config = small_config(model="linear")
    key = noise.stream_key(config.seed, noise.Stream.EVAL)
    draws = jnp.stack([jax.random.normal(noise.fold(key, i), SHAPE) for i in range(NUM_EXAMPLES)])
    noisy = examples().images / np.float32(255) + config.sigma * draws
    logits = make_model(config).apply(first_state(config).variables, noisy)
    return (logits.argmax(axis=-1) == examples().labels).sum()


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("batch", [16, 13, 100])
def test_evaluation_counts_every_image_once(num_devices, batch):
    config = small_config(model="linear", eval_batch_size=batch)
    inputs = ArrayInputs(config, examples(), examples(), devices=jax.devices()[:num_devices], extra={})
    evaluate, variables = compile_steps(config, inputs).evaluate, first_state(config).variables
    found = [evaluate(variables, np.int32(start), *feed.args) for start, feed in inputs.test_feeds()]
    correct, seen = np.sum(found, axis=0)
    assert seen == NUM_EXAMPLES
    assert correct == correct_predictions()


def test_training_learns():
    config = small_config(num_epochs=1, sigma=0.25)
    _, history = run_steps(config, 1, 60)
    assert np.mean([step["cross_entropy"] for step in history[-3:]]) < 0.6 * history[0]["cross_entropy"]


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method='magic' is unknown; use one of catrs, gaussian, macer, smoothadv"):
        methods.make_objective(small_config(method="magic"))


def test_a_model_that_cannot_take_the_images_is_told(monkeypatch):
    monkeypatch.setitem(DATASETS, "specks", DATASETS["mnist"]._replace(image_shape=(6, 6, 1)))
    config = small_config(dataset={"name": "specks"})
    with pytest.raises(ValueError, match=r"model='lenet' cannot take the \(6, 6, 1\) images of dataset 'specks'"):
        create_state(config)


@pytest.fixture
def with_batch_norm(monkeypatch):
    monkeypatch.setitem(models.MODELS, "resnet8", functools.partial(CifarResNet, depth=8))
    monkeypatch.setitem(models.MODELS, "normalized", Normalized)


def test_batch_statistics_are_those_of_all_copies_on_all_devices(with_batch_norm):
    config = small_config(model="resnet8")
    start = first_state(config)
    one, (one_metrics,) = steps_once(config, 1, 1)
    many, (many_metrics,) = run_steps(config, 8, 1)
    assert one_metrics["loss"] == pytest.approx(many_metrics["loss"], rel=1e-5)
    assert_close(one.model_state, many.model_state, atol=2e-5)  # sums in another order, through eight layers
    # The same gradient: rounding may flip a ReLU here and there, statistics of one device alone would change it all.
    moved, differs = (
        np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((start.params, many.params), (one.params, many.params))
    )
    assert np.linalg.norm(differs) < 0.02 * np.linalg.norm(moved)

    # The first layer's mean, from the images themselves: 0.9 times 0 plus 0.1 times the batch's, all 16 x 2 images.
    key, order = noise.stream_key(config.seed, noise.Stream.TRAIN), make_order(config, NUM_EXAMPLES)(0)
    images = examples().images[np.asarray(order[:16])] / np.float32(255)
    draws = noise.training_noise(key, step=0, positions=jnp.arange(16), num_noise=2, shape=SHAPE)
    noisy = (images[None] + config.sigma * draws).reshape(-1, *SHAPE)
    kernel = start.params["conv1"]["kernel"]
    first = jax.lax.conv_general_dilated(noisy, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(many.model_state["batch_stats"]["bn1"]["mean"], 0.1 * first.mean((0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_step_in_parts_is_the_same_step(num_devices):
    whole, whole_history = steps_once(small_config(**FAST), 1)
    parts, parts_history = run_steps(small_config(**FAST, accumulate_steps=4), num_devices)
    assert_close(whole.params, parts.params, atol=2e-6)  # sums in another order
    for one, other in zip(whole_history, parts_history, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_in_pieces_is_the_same_step(monkeypatch, num_devices):
    config = small_config(**FOUR_COPIES, **FAST)
    whole, whole_history = steps_once(config, num_devices)
    asked = []

    def pieces_of(*sizes):
        asked.append(sizes)
        return 4

    monkeypatch.setattr("rs_consistency.training.step.pieces_of", pieces_of)
    pieces, pieces_history = run_steps(config, num_devices)
    assert asked[0] == (8 // num_devices, 4, "cpu")
    assert_close(whole.params, pieces.params, atol=2e-6)  # sums in another order
    for one, other in zip(whole_history, pieces_history, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_a_compiled_loop_over_the_parts_gives_the_same_step(with_batch_norm, monkeypatch):
    # Accelerators loop where the CPU unrolls.
    attack = {"num_steps": 2, "warmup_epochs": 0}
    config = small_config(model="normalized", accumulate_steps=2, method="smoothadv", smoothadv=attack)
    unrolled, unrolled_history = run_steps(config, 2, 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    looped, looped_history = run_steps(config, 2, 1)
    assert_close(unrolled.model_state, looped.model_state, atol=1e-4)  # other fusions, and steps along small gradients
    assert looped_history[0]["loss"] == pytest.approx(unrolled_history[0]["loss"], rel=1e-3)


def test_parts_with_batch_norm_do_not_depend_on_the_devices(with_batch_norm):
    config = small_config(model="normalized", accumulate_steps=2)
    one, _ = run_steps(config, 1, 1)
    many, _ = run_steps(config, 4, 1)
    assert_close(one.model_state, many.model_state, atol=2e-5)
    # Each part has statistics of its own: the running mean moves twice.
    whole, _ = run_steps(small_config(model="normalized"), 1, 1)
    moved = np.abs(one.model_state["batch_stats"]["bn1"]["mean"]).max()
    assert moved > 1.5 * np.abs(whole.model_state["batch_stats"]["bn1"]["mean"]).max()


def test_bfloat16_computes_in_half_and_keeps_the_rest_in_single_precision(with_batch_norm):
    single, single_history = steps_once(small_config(model="resnet8"), 1, 1)
    half, half_history = run_steps(small_config(model="resnet8", dtype="bfloat16"), 2, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float32"), np.dtype("int32")}
    loss = single_history[0]["loss"]
    # Eight bits in a mantissa, seven layers: near, and not the same.
    assert half_history[0]["loss"] == pytest.approx(loss, rel=3e-2) and half_history[0]["loss"] != loss
    assert_close(single.model_state, half.model_state, atol=2e-2)


def test_augmentation_reaches_the_step_by_step_and_position():
    config = small_config(**GAUSSIAN, model="linear", dataset={"augment": "crop"})
    _, history = run_steps(config, 2, 1)
    key, order = noise.stream_key(config.seed, noise.Stream.AUGMENT), make_order(config, NUM_EXAMPLES)(0)
    chosen = np.asarray(order[:32])
    keys = jnp.stack([noise.fold(key, 0, position) for position in range(32)])
    images = AUGMENTATIONS["crop"](keys, examples().images[chosen] / np.float32(255))
    draws = noise.training_noise(
        noise.stream_key(config.seed, noise.Stream.TRAIN), step=0, positions=jnp.arange(32), num_noise=1, shape=SHAPE
    )
    logits = make_model(config).apply(first_state(config).variables, images + config.sigma * draws[0])
    expected = losses.cross_entropy(logits[None], jnp.asarray(examples().labels[chosen])).mean()
    assert history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_methods_are_told_the_epoch(monkeypatch):
    # 2 steps in an epoch: the radius of the attack is 0 in the first, huge from the second on.
    attack = {"num_steps": 1, "epsilon": 8.0}
    config = small_config(**GAUSSIAN, model="linear", method="smoothadv", smoothadv=attack, optimizer={"lr": 1e-9})
    monkeypatch.setattr(smoothadv, "warmup", lambda epoch, _: jnp.where(epoch == 0, 0.0, 1.0))
    _, history = run_steps(config, 2, 4)
    first, second = ([step["loss"] for step in history[i : i + 2]] for i in (0, 2))
    assert min(second) > max(first) + 0.05


def test_a_method_gets_its_own_rows_of_what_it_prepared(monkeypatch):
    def build(config):
        def terms(model, batch):
            logits = model.noisy(batch.images, batch.noise)
            wrong = (batch.extra["label"] != batch.labels).astype(jnp.float32)
            return MethodOutput({"wrong": wrong + 0 * logits.sum(axis=(0, 2))}, logits)

        return terms

    monkeypatch.setitem(methods.METHODS, "check", Method(build))
    config = small_config(model="linear", method="check", consistency={"lbd": 0.0})
    for shift, expected in ((0, 0), (1, 1)):
        extra = {"label": (examples().labels + shift) % 10}
        _, history = run_steps(config, 4, 3, extra=extra)
        assert [step["wrong"] for step in history] == [expected] * 3
