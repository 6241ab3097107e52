"""Every method: its terms against their formulas, its limits and schedules, and real steps on every kind of model."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from configs import default
from rs_consistency import attacks, data, losses, methods, models
from rs_consistency.common.errors import UserError
from rs_consistency.devices import parallel
from rs_consistency.methods.base import warmup
from rs_consistency.models.cifar_resnet import CifarResNet
from rs_consistency.models.densenet import DenseNet
from rs_consistency.models.resnet import ResNet
from rs_consistency.models.wide_resnet import WideResNet
from rs_consistency.training.array_inputs import ArrayInputs
from rs_consistency.training.step import compile_steps, create_state
from tests.helpers import TINY, final_variables, write_tfds
from tests.training.normalized import Normalized

SHAPE, NUM_CLASSES, NUM_EXAMPLES, NUM_COPIES = (5, 4, 2), 3, 12, 4
WEIGHTS = np.random.default_rng(1).normal(size=(*SHAPE, NUM_CLASSES))
IMAGES = np.random.default_rng(2).uniform(size=(NUM_EXAMPLES, *SHAPE))
LABELS = np.arange(NUM_EXAMPLES) % NUM_CLASSES
NOISE = 0.5 * np.random.default_rng(3).normal(size=(NUM_COPIES, NUM_EXAMPLES, *SHAPE))
SMOOTHED = np.random.default_rng(4).dirichlet(np.ones(NUM_CLASSES), size=NUM_EXAMPLES)


class Linear:
    """A classifier for a method, without state."""

    def frozen(self, images):
        return jnp.tensordot(images, jnp.asarray(WEIGHTS, images.dtype), axes=3)

    def noisy(self, images, noise):
        return attacks.copies(self.frozen, images, noise)

    def clean(self, images):
        return self.frozen(images)


def make_batch(epoch=0):
    return methods.Batch(
        images=jnp.asarray(IMAGES, jnp.float32),
        labels=jnp.asarray(LABELS),
        noise=jnp.asarray(NOISE, jnp.float32),
        keys=jax.random.split(jax.random.key(5), NUM_EXAMPLES),
        epoch=jnp.asarray(epoch, jnp.int32),
        extra={"smoothed": jnp.asarray(SMOOTHED, jnp.float32)},
    )


def make_config(method, **changes):
    config = default.get_config()
    config.method = method
    config.num_noise = NUM_COPIES
    config.update(changes)
    return config


def terms_of(method, epoch=0, **changes):
    objective = methods.make_objective(make_config(method, **changes))
    result = objective(Linear(), make_batch(epoch))
    np.testing.assert_allclose(result.loss, sum(result.terms.values()), rtol=1e-6)
    assert all(values.shape == (NUM_EXAMPLES,) for values in result.terms.values())
    return {name: np.asarray(values) for name, values in result.terms.items()}


def log_probs(images, noise=None):
    images = np.asarray(images, np.float64)
    noisy = images[None] + (np.zeros((1, *images.shape)) if noise is None else np.asarray(noise, np.float64))
    return special.log_softmax(np.tensordot(noisy, WEIGHTS, axes=3), axis=-1)  # [M, B, K]


def of_label(values):
    return values[..., np.arange(NUM_EXAMPLES), LABELS]


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)  # float32 logits of sums of 40


def test_gaussian():
    close(terms_of("gaussian")["cross_entropy"], -of_label(log_probs(IMAGES, NOISE)).mean(axis=0))


def test_stability():
    terms = terms_of("stability", stability={"lbd": 2.0})
    clean, noisy = log_probs(IMAGES)[0], log_probs(IMAGES, NOISE)
    close(terms["cross_entropy"], -of_label(clean))
    close(terms["stability"], 2 * -(np.exp(clean)[None] * noisy).sum(axis=-1).mean(axis=0))


def test_smoothadv_trains_on_the_attacked_images_with_the_same_noise():
    terms = terms_of("smoothadv", epoch=9, smoothadv={"epsilon": 0.7, "num_steps": 3})
    batch = make_batch()
    example = (Linear().frozen, batch.images, batch.labels, batch.noise)
    attacked = attacks.smooth_adv(*example, epsilon=0.7, num_steps=3, keys=batch.keys)
    close(terms["cross_entropy"], -of_label(log_probs(attacked, NOISE)).mean(axis=0))
    # The form published with consistency. Of that many examples the mean has a gradient of the order of its 1e-8.
    settings = {"consistency": {"lbd": 1.0}, "batch_size": NUM_COPIES * 10**8}
    both = terms_of("smoothadv", epoch=9, smoothadv={"epsilon": 0.7, "num_steps": 3}, **settings)
    projected = attacks.smooth_adv(*example, epsilon=0.7, num_steps=3, mean_over=10**8)
    assert np.abs(projected - attacked).max() > 0.01
    close(both["cross_entropy"], -of_label(log_probs(projected, NOISE)).mean(axis=0))
    assert (terms["cross_entropy"] > terms_of("gaussian")["cross_entropy"]).all()


def test_smoothadv_at_epsilon_zero_is_gaussian():
    np.testing.assert_array_equal(
        terms_of("smoothadv", smoothadv={"epsilon": 0.0, "num_steps": 2})["cross_entropy"],
        terms_of("gaussian")["cross_entropy"],
    )


def test_the_radius_of_smoothadv_grows_over_the_first_epochs():
    full = {"epsilon": 0.8, "num_steps": 2, "warmup_epochs": 4}
    for epoch, epsilon in {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 0.8, 50: 0.8}.items():
        fixed = {"epsilon": epsilon, "num_steps": 2, "warmup_epochs": 0}
        np.testing.assert_allclose(
            terms_of("smoothadv", epoch, smoothadv=full)["cross_entropy"],
            terms_of("smoothadv", epoch, smoothadv=fixed)["cross_entropy"],
            rtol=1e-5,
        )
    assert [float(warmup(jnp.asarray(epoch), 10)) for epoch in (0, 4, 9, 10, 89)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0]
    )


def test_macer():
    settings = {"lbd": 3.0, "beta": 0.5, "gamma": 8.0, "deferred": False}
    terms = terms_of("macer", macer=settings)
    logits = np.tensordot(IMAGES[None] + NOISE, WEIGHTS, axes=3)
    close(terms["classification"], -np.log(np.exp(of_label(log_probs(IMAGES, NOISE))).mean(axis=0) + 1e-10))
    mean = special.softmax(0.5 * logits, axis=-1).mean(axis=0)
    second, first = np.sort(mean, axis=-1)[:, -2:].T
    gap = stats.norm.ppf(first) - stats.norm.ppf(second)
    counted = (mean.argmax(axis=-1) == LABELS) & (gap <= 8)
    close(terms["robustness"], 3 * 0.25 * np.where(counted, 8 - gap, 0))
    assert 0 < counted.sum() < NUM_EXAMPLES


def test_macer_at_lbd_zero_is_the_cross_entropy_of_the_mean():
    terms = terms_of("macer", macer={"lbd": 0.0, "deferred": False})
    assert not terms["robustness"].any()
    close(terms["classification"], -np.log(np.exp(of_label(log_probs(IMAGES, NOISE))).mean(axis=0)))


def test_deferred_macer_waits_until_after_the_first_drop_of_the_learning_rate():
    settings = {"lbd": 3.0, "beta": 0.5, "deferred": True}
    at_once = terms_of("macer", 0, macer={**settings, "deferred": False}, optimizer={"lr_step_size": 30})
    for epoch, waits in {0: True, 29: True, 30: True, 31: False, 89: False}.items():
        robustness = terms_of("macer", epoch, macer=settings, optimizer={"lr_step_size": 30})["robustness"]
        np.testing.assert_array_equal(robustness, 0 * at_once["robustness"] if waits else at_once["robustness"])
    assert at_once["robustness"].any()


@pytest.mark.parametrize(("clean_step", "epoch"), [(0, 0), (0, 20), (1, 0), (2, 20)])
def test_smoothmix(clean_step, epoch):
    settings = {"step_size": 0.1, "num_steps": 3, "clean_step": clean_step, "eta": 5.0, "warmup_epochs": 10}
    terms = terms_of("smoothmix", epoch, smoothmix=settings)
    batch, weight = make_batch(), min(1, (epoch + 1) / 10)
    kept, last = attacks.unbounded(
        Linear().frozen, batch.images, batch.labels, batch.noise, step_size=0.1, num_steps=3, keep_step=clean_step
    )
    kept, last = np.float64(kept), np.float64(last)
    norm = np.sqrt(np.square(kept - IMAGES).sum(axis=(1, 2, 3), keepdims=True))
    clean = IMAGES + (kept - IMAGES) * np.minimum(1, 0.1 * clean_step * weight / np.maximum(norm, 1e-12))
    assert (norm > 0.05).all() == (clean_step > 0)
    close(terms["cross_entropy"], -of_label(log_probs(clean, NOISE)).mean(axis=0))

    share = np.float64([jax.random.uniform(key, maxval=0.5) for key in batch.keys])
    assert 0 <= share.min() < 0.2 and 0.3 < share.max() <= 0.5
    along = share[:, None, None, None]
    mean = np.exp(log_probs(clean, NOISE)).mean(axis=0)
    target = (1 - share[:, None]) * mean + share[:, None] / NUM_CLASSES
    mixed = log_probs((1 - along) * clean + along * last, NOISE)
    divergence = (target[None] * (np.log(target)[None] - mixed)).sum(axis=-1).mean(axis=0)
    right = mean.argmax(axis=-1) == LABELS
    close(terms["mixup"], 5 * weight * np.where(right, divergence, 0))
    assert 0 < right.sum() < NUM_EXAMPLES


def test_the_gradient_of_smoothmix_flows_through_the_soft_label():
    class Scaled(Linear):
        def __init__(self, scale, fixed):
            self.scale, self.calls, self.fixed = scale, 0, fixed

        def noisy(self, images, noise):
            self.calls += 1  # the first call gives the soft label, the second is compared with it
            scale = jax.lax.stop_gradient(self.scale) if self.calls == 1 and self.fixed else self.scale
            return scale * super().noisy(images, noise)

    objective = methods.make_objective(make_config("smoothmix", smoothmix={"eta": 100.0, "warmup_epochs": 0}))

    def mixup(scale, fixed):
        return objective(Scaled(scale, fixed), make_batch()).terms["mixup"].sum()

    flowing, fixed = (jax.grad(mixup)(1.0, fixed) for fixed in (False, True))
    step = 1e-2
    finite = (mixup(1 + step, False) - mixup(1 - step, False)) / (2 * step)
    assert abs(flowing - fixed) > 0.01 * abs(flowing)
    assert abs(flowing - finite) < 0.1 * abs(flowing - fixed)


def test_catrs():
    settings = {"lbd": 0.7, "epsilon": 0.5, "num_steps": 2}
    terms = terms_of("catrs", catrs=settings)
    batch = make_batch()
    cross_entropies = -of_label(log_probs(IMAGES, NOISE))  # [M, B]
    share = (log_probs(IMAGES, NOISE).argmax(axis=-1) == LABELS).mean(axis=0)
    draws = np.stack([jax.random.uniform(key, (NUM_COPIES,)) for key in batch.keys])
    kept = np.maximum((draws < share[:, None]).sum(axis=1), 1)
    low = [np.sort(cross_entropies[:, b])[: kept[b]].sum() / NUM_COPIES for b in range(NUM_EXAMPLES)]
    close(terms["low_confidence"], low)

    noise = attacks.worst_noise(
        Linear().frozen, batch.images, jnp.log(batch.extra["smoothed"]), batch.noise, epsilon=0.5, num_steps=2
    )
    predictions = log_probs(IMAGES, noise)
    divergence = (SMOOTHED[None] * (np.log(SMOOTHED)[None] - predictions)).sum(axis=-1).max(axis=0)
    close(terms["high_confidence"], 0.7 * np.where(kept == NUM_COPIES, divergence, 0))
    assert len(set(kept.tolist())) >= 3  # from one to all


def test_the_number_of_kept_copies_is_binomial():
    # An example that is always right keeps all copies, one that never is keeps one.
    class Certain(Linear):
        def noisy(self, images, noise):
            logits = 50 * jax.nn.one_hot(jnp.where(jnp.arange(NUM_EXAMPLES) < 6, LABELS, (LABELS + 1) % 3), 3)
            return jnp.broadcast_to(logits, (NUM_COPIES, *logits.shape))

    objective = methods.make_objective(make_config("catrs"))
    terms = objective(Certain(), make_batch()).terms
    np.testing.assert_allclose(terms["low_confidence"][6:], 50 / NUM_COPIES, rtol=1e-5)
    assert (terms["high_confidence"][:6] > 0).all() and not terms["high_confidence"][6:].any()


SUN = {"discard_epoch": 6, "discard_threshold": 0.5, "weigh_every": 10, "epsilon": 0.5, "num_steps": 3}


def test_sun_attacks_the_noise_once_hard_examples_are_dropped():
    np.testing.assert_array_equal(
        terms_of("sun", epoch=5, sun=SUN)["cross_entropy"], terms_of("gaussian")["cross_entropy"]
    )
    batch = make_batch()
    noise = attacks.on_sphere(Linear().frozen, batch.images, batch.labels, batch.noise, step_size=0.5, num_steps=3)
    for epoch in (6, 80):
        got = terms_of("sun", epoch=epoch, sun=SUN)["cross_entropy"]
        close(got, -of_label(log_probs(IMAGES, noise)).mean(axis=0))
    assert np.abs(noise - batch.noise).max() > 0.01


class Asked:
    """An accuracy with the given shares, that notes what it is asked."""

    def __init__(self, **shares):
        self.shares, self.calls = shares, []

    def __call__(self, num_votes, asked):
        self.calls.append((num_votes, asked.tolist()))
        return np.where(asked, self.shares[f"of_{num_votes}"], 0.0)


def test_sun_drops_hard_examples_and_weighs_the_others():
    config = make_config("sun", sun=SUN)
    choose = methods.METHODS["sun"].choose
    everyone = np.ones(5)
    accuracy = Asked(of_100=[0.49, 0.5, 0.9, 1.0, 0.0], of_16=[0.9, 0.5, 14 / 16, 1.0, 1.0])
    for epoch in (0, 5):
        np.testing.assert_array_equal(choose(config, epoch, everyone, accuracy), everyone)
    assert accuracy.calls == []
    weights = choose(config, 6, everyone, accuracy)
    kept = [False, True, True, True, False]
    assert accuracy.calls == [(100, [True] * 5), (16, kept)]
    # One-sided Clopper-Pearson bounds at 0.1 of 12 (at least), 14 and 16 of 16 right votes.
    bounds = [stats.beta.ppf(0.1, right, 16 - right + 1) for right in (12, 14, 16)]
    np.testing.assert_allclose(weights, [0, *stats.norm.ppf(bounds), 0], rtol=1e-12)
    accuracy.calls.clear()
    np.testing.assert_array_equal(choose(config, 7, weights, accuracy), weights)
    assert accuracy.calls == []
    accuracy.shares["of_16"] = np.ones(5)
    again = choose(config, 16, weights, accuracy)  # those that were dropped stay so
    assert accuracy.calls == [(16, kept)]
    np.testing.assert_allclose(again, np.where(kept, weights[3], 0), rtol=1e-12)
    with pytest.raises(UserError, match=r"sun.discard_threshold=0.5: no training example has that share"):
        choose(config, 6, everyone, Asked(of_100=np.zeros(5)))


def test_no_example_that_sun_keeps_gets_a_weight_of_zero():
    for votes in range(14, 60):
        config = make_config("sun", sun={**SUN, "weigh_votes": votes})
        weights = methods.METHODS["sun"].choose(config, 16, np.ones(1), lambda num_votes, asked: np.zeros(1))
        assert weights > 0, votes


ALL_METHODS = sorted(methods.METHODS)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_consistency_term_composes_with_every_method(method):
    alone = terms_of(method)
    both = terms_of(method, consistency={"lbd": 4.0, "eta": 0.3})
    assert both.keys() - alone.keys() == {"consistency"}
    if method in ("gaussian", "stability", "macer", "catrs", "sun"):  # those on the images themselves
        logits = Linear().noisy(make_batch().images, make_batch().noise)
        close(both["consistency"], losses.consistency(logits, lbd=4.0, eta=0.3))
    for name, values in alone.items():
        if method != "smoothadv":  # its attack has another form beside the term
            np.testing.assert_array_equal(both[name], values)


# Every kind of model, as shallow as it can be, and the smallest one with batch statistics.
SMALL_MODELS = {
    "normalized": Normalized,
    "lenet": models.MODELS["lenet"],
    "resnet8": functools.partial(CifarResNet, depth=8),
    "densenet10": functools.partial(DenseNet, layers=1),
    "wideresnet10_1": functools.partial(WideResNet, depth=10, widen=1),
    "bottleneck8": functools.partial(ResNet, blocks=(1, 1)),
}
FEW_STEPS = {
    "smoothadv": {"num_steps": 1, "warmup_epochs": 0},
    "smoothmix": {"num_steps": 1, "warmup_epochs": 0},
    "catrs": {"num_steps": 1},
    "macer": {"deferred": False},
    "sun": {"num_steps": 1, "discard_epoch": 0},
}


@functools.cache
def initial_state(model):
    """The state of a run on CIFAR-10, made once for all methods: to compile a model's init takes seconds."""
    config = make_config("gaussian", model=model)
    config.dataset.name = "cifar10"
    state = create_state(config)
    return jax.tree.map(np.array, state)  # copies: a step takes the buffers


def one_step(config, num_examples=8, num_devices=2):
    rng = np.random.default_rng(6)
    images = rng.integers(0, 256, (num_examples, 32, 32, 3)).astype(np.uint8)
    split = data.Split(images, (np.arange(num_examples) % 10).astype(np.int32))
    extra = {"smoothed": rng.dirichlet(np.ones(10), size=num_examples).astype(np.float32)}
    devices = jax.devices()[:num_devices]
    inputs = ArrayInputs(config, split, split, devices=devices, extra=extra)
    steps = compile_steps(config, inputs)
    before = initial_state(config.model)
    state = parallel.replicate(jax.tree.map(jnp.array, before), devices)
    (feed,) = inputs.feeds(0, 1)
    state, metrics = steps.train(state, np.int32(1), *feed.args, **feed.parts)
    return before, jax.device_get(state), jax.tree.map(lambda values: np.asarray(values)[0], metrics)


# Smoothmix uses a model in every way that any method does, but for two passes in training mode: those are tried on
# the model with batch statistics. Other blocks differ from basic blocks in nothing that a method can see.
_QUICK = {"normalized": ALL_METHODS, **{name: ["gaussian"] for name in ("bottleneck8", "wideresnet10_1", "densenet10")}}
_COMBINATIONS = [
    pytest.param(method, model, marks=() if method in _QUICK.get(model, ["smoothmix"]) else pytest.mark.slow)
    for model in SMALL_MODELS
    for method in ALL_METHODS
]


@pytest.mark.parametrize(("method", "model"), _COMBINATIONS)
def test_every_method_takes_a_step_on_every_kind_of_model(monkeypatch, method, model):
    monkeypatch.setitem(models.MODELS, model, SMALL_MODELS[model])
    config = make_config(method, model=model, num_noise=2, batch_size=8, consistency={"lbd": 1.0}, **FEW_STEPS)
    config.dataset.name = "cifar10"
    before, after, metrics = one_step(config)
    assert after.step == 1
    assert all(np.isfinite(value) for value in metrics.values())
    for name in (name for name in metrics if name not in ("loss", "param_norm", "robustness", "mixup")):
        assert metrics[name] != 0 or (method, name) == ("catrs", "high_confidence")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
    assert np.mean([leaf > 0 for leaf in jax.tree.leaves(moved)]) > 0.9
    if model == "lenet":
        assert after.model_state == {}
    else:
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before.model_state, after.model_state)
        assert np.mean(jax.tree.leaves(moved)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet110", "resnet50", "densenet40", "wideresnet28_10"])
def test_the_deep_models_take_a_step(model):
    config = make_config("gaussian", model=model, num_noise=2, batch_size=4, consistency={"lbd": 1.0})
    config.dataset.name = "cifar10"
    before, after, metrics = one_step(config, num_examples=2, num_devices=1)
    assert np.isfinite(metrics["loss"]) and metrics["consistency"] > 0
    assert float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, before.params, after.params))) > 0


# CAT-RS uses the running batch statistics, too. A plain ResNet goes the same way in tests/training/test_imagenet.py,
# and `sun` in tests/training/test_choice.py.
PIPELINES = {
    "gaussian": [],
    "stability": ["--config.method=stability"],
    "smoothadv+consistency": ["--config.method=smoothadv", "--config.consistency.lbd=1"],
    "macer+consistency": ["--config.method=macer", "--config.consistency.lbd=1"],
    "smoothmix": ["--config.method=smoothmix"],
    "catrs": ["--config.method=catrs", "--config.catrs.num_votes=16", "--config.model=normalized"],
}


@pytest.fixture(scope="module")
def few_images(tfds_dir, tmp_path_factory):
    """64 training images of MNIST: two steps in an epoch."""
    folder = tmp_path_factory.mktemp("few")
    splits = {split: data.load("mnist", split) for split in ("train", "test")}
    arrays = {split: (arrays.images[:64], arrays.labels[:64]) for split, arrays in splits.items()}
    write_tfds(folder, "mnist", "3.0.1", arrays)
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_every_method_trains_saves_resumes_and_certifies(monkeypatch, program, few_images, toy_trained, tmp_path, name):
    monkeypatch.setitem(models.MODELS, "normalized", Normalized)
    monkeypatch.setenv("TFDS_DATA_DIR", str(few_images))
    workdir = tmp_path / "run"
    command = [
        *TINY,
        "--config.consistency.lbd=0",
        "--config.smoothadv.num_steps=1",
        "--config.smoothmix.num_steps=1",
        "--config.catrs.num_steps=1",
        f"--config.catrs.teacher={toy_trained}",
        *PIPELINES[name],
        "--config.num_devices=2",
        f"--workdir={workdir}",
    ]
    program.succeeds("cli.train", *command)
    whole = final_variables(workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    moved = jax.tree.map(lambda a, b: (a != b).any(), final_variables(workdir), whole)
    assert np.mean(jax.tree.leaves(moved)) > 0.9
    program.succeeds("cli.train", *command)
    assert "continuing after step 2" in program.err
    for one, other in zip(*map(jax.tree.leaves, (whole, final_variables(workdir))), strict=True):
        np.testing.assert_array_equal(one, other)
    certify = ["--n=50", "--n0=10", "--max=3", "--batch_size=64", "--num_devices=2"]
    assert "3 images, ACR" in program.succeeds("cli.certify", f"--workdir={workdir}", *certify).out
