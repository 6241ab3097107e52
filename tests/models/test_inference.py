"""Models made ready for inference against the models themselves: logits, types, votes, and what is left to compute."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rs_consistency.models.cifar_resnet import CifarResNet
from rs_consistency.models.densenet import DenseNet
from rs_consistency.models.inference import for_inference
from rs_consistency.models.lenet import LeNet
from rs_consistency.models.resnet import ResNet
from rs_consistency.models.wide_resnet import WideResNet
from rs_consistency.smoothing.votes import count_votes, vote_settings

RGB = {"num_classes": 5, "mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
SMALL = {
    "lenet": (LeNet(num_classes=5, mean=(0.13,), std=(0.31,)), (16, 18, 1)),
    "cifar_resnet": (CifarResNet(depth=8, **RGB), (8, 7, 3)),
    "densenet": (DenseNet(layers=1, **RGB), (8, 9, 3)),
    "wide_resnet": (WideResNet(depth=10, widen=1, **RGB), (8, 8, 3)),
    "resnet": (ResNet(blocks=(1, 1), **RGB), (32, 33, 3)),
}

# The largest difference of two logits, in units of their standard deviation. float32 rounds by 6e-8 in each of up to 10
# layers, sums of up to 800 terms, of numbers up to 30 times that. bfloat16 rounds every kernel and activation by 2e-3.
# Measured: at most 1.3e-5 and 0.07.
ROUNDING = {"float32": 3e-5, "bfloat16": 0.12}


def random_variables(model, image_shape):
    """All drawn; variances from 1e-7 to 1, and scales of both signs that keep the activations near one."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        if name == "var":
            return 10 ** rng.uniform(-7, 0, size=shape)
        return 0.3 * rng.normal(size=shape)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    flat = flatten_dict(jax.tree_util.tree_map_with_path(draw, shapes))
    for path, var in flat.items():
        scale = ("params", *path[1:-1], "scale")
        if path[-1] == "var" and scale in flat:
            factor = rng.choice([-1, 1], size=var.shape) * rng.uniform(0.5, 1.5, size=var.shape)
            flat[scale] = factor * np.sqrt(var + 1e-5)
    return unflatten_dict({path: jnp.asarray(leaf, jnp.float32) for path, leaf in flat.items()})


def change(variables, **changes):
    """The variables with every leaf of some name changed: what a broken twin would compute with."""
    flat = {path: changes.get(path[-1], lambda leaf: leaf)(leaf) for path, leaf in flatten_dict(variables).items()}
    return unflatten_dict(flat)


TWINS = {  # the folding of these variables forgets a term of the true ones
    "epsilon": {"var": lambda var: var - 1e-5},
    "mean": {"mean": jnp.zeros_like},
    "scale": {"scale": jnp.ones_like},
    "bias of batch norm": {"bias": jnp.zeros_like},
}


class Case:
    """A small model, noisy images, and both logits of them; no class has all the votes."""

    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype
        model, self.image_shape = SMALL[name]
        self.model = model.clone(dtype=jnp.dtype(dtype))
        rng = np.random.default_rng(1)
        images = rng.uniform(size=(3, 1, *self.image_shape)) + 0.5 * rng.normal(size=(3, 100, *self.image_shape))
        self.images = images.reshape(-1, *self.image_shape).astype(np.float32)  # [B, copies, H, W, C] -> [N, H, W, C]
        random = random_variables(self.model, self.image_shape)
        self.apply_fn, _ = for_inference(self.model, random, image_shape=self.image_shape)
        self.original = functools.partial(self.model.apply, train=False)
        self._original, self._ready = jax.jit(self.original), jax.jit(self.apply_fn)
        self.variables = self._centred(random) if dtype == "float32" else Case.get(name, "float32").variables
        self.want = np.asarray(self._original(self.variables, self.images))
        self.spread = self.want.std()
        self.ready = self.fold(self.variables)

    @classmethod
    @functools.cache
    def get(cls, name, dtype):
        return cls(name, dtype)

    def _centred(self, variables):
        """The last bias takes the mean from the logits, so that classes compete."""
        mean = jnp.mean(self._original(variables, self.images), axis=0)
        last = ("params", "Dense_1" if self.name == "lenet" else "fc", "bias")
        flat = flatten_dict(variables)
        return unflatten_dict({**flat, last: flat[last] - mean})

    def fold(self, variables):
        return for_inference(self.model, variables, image_shape=self.image_shape)[1]

    def logits(self, ready):
        return np.asarray(self._ready(ready, self.images))

    def error(self, ready):
        """The largest difference of the logits, in units of their spread."""
        return np.abs(self.logits(ready) - self.want).max() / self.spread


@pytest.fixture(scope="module", params=[(name, dtype) for name in SMALL for dtype in ROUNDING], ids="-".join)
def case(request):
    return Case.get(*request.param)


def test_logits_and_votes_are_those_of_the_model(case):
    got, margin = case.logits(case.ready), np.diff(np.sort(case.want, axis=1)[:, -2:], axis=1)[:, 0]
    assert got.dtype == case.want.dtype == np.float32
    assert case.error(case.ready) < ROUNDING[case.dtype]
    tie = margin <= 2 * ROUNDING[case.dtype] * case.spread
    np.testing.assert_array_equal(got.argmax(axis=1)[~tie], case.want.argmax(axis=1)[~tie])
    assert np.bincount(case.want.argmax(axis=1)).max() < 0.9 * len(got)
    assert tie.mean() < {"float32": 0.01, "bfloat16": 0.4}[case.dtype]  # measured: at most 0 and 0.3


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_gives_other_logits(case, twin):
    if case.name != "lenet":  # has no batch normalization
        broken = case.fold(change(case.variables, **TWINS[twin]))
        if twin == "bias of batch norm":  # and not that of the last layer
            broken["params"]["fc"] = case.ready["params"]["fc"]
        assert case.error(broken) > 3 * ROUNDING[case.dtype]


def test_bfloat16_is_about_as_far_from_float32_as_before(case):
    if case.dtype == "bfloat16":
        full = Case.get(case.name, "float32").want
        before, after = (np.linalg.norm(logits - full) for logits in (case.want, case.logits(case.ready)))
        # Other roundings of the same size; some that were declared before XLA leaves out on the CPU.
        assert 0 < after < 2 * before


def equations(function, *args):
    """The equations of a function's jaxpr, and the types of its products of matrices and convolutions."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    products = [e for e in jaxpr.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    return jaxpr, [[v.aval.dtype for v in (*e.invars, *e.outvars)] for e in products]


def test_what_depends_on_the_variables_alone_is_not_computed_again(case, monkeypatch):
    # Forms of convolutions, which have a test of their own, would hide what else changed.
    monkeypatch.setattr("rs_consistency.models.inference.inference_convolution", jax.lax.conv_general_dilated)
    before, types_before = equations(case.original, case.variables, case.images)
    # A function of its own, since JAX keeps what it traced of the other, with the forms.
    after, types_after = equations(lambda *args: case.apply_fn(*args), case.ready, case.images)
    assert types_after == types_before and len(types_after) >= 4
    assert "rsqrt" not in str(after) and ("rsqrt" in str(before)) == (case.name != "lenet")
    assert str(before).count(" div ") == str(after).count(" div ") + 1  # the input normalization

    def casts(jaxpr):
        inputs = set(jaxpr.invars[:-1])  # the variables
        found = [e for e in jaxpr.eqns if e.primitive.name == "convert_element_type" and e.invars[0] in inputs]
        return len([e for e in found if e.params["new_dtype"] != e.invars[0].aval.dtype])

    assert casts(after) == 0 and (casts(before) > 0) == (case.dtype == "bfloat16")


def test_types_and_names_of_the_variables(case):
    params = flatten_dict(case.ready["params"])
    last = "Dense_1" if case.name == "lenet" else "fc"
    for path, leaf in params.items():
        assert leaf.dtype == ("float32" if path[0] == last else case.dtype), path
    assert {leaf.dtype for leaf in jax.tree.leaves(case.ready["affine"])} <= {jnp.dtype("float32")}
    assert set(case.ready) == {"params", "affine"}
    norms = {path[1:-1] for path in flatten_dict(case.variables) if path[-1] == "var"}
    assert {path[:-1] for path in flatten_dict(case.ready["affine"])} == norms
    assert set(params) == {p for p in flatten_dict(case.variables["params"]) if p[:-1] not in norms}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_votes_of_a_certification_change_at_ties_alone(dtype):
    """Every vote is counted as one of: the same, a tie of the model within rounding, another one."""
    case = Case.get("cifar_resnet", dtype)

    def compare(variables, images):
        original, ready = variables
        want, got = case.original(original, images), case.apply_fn(ready, images)
        first, second = jax.lax.top_k(want, 2)[0].T
        tie = first - second <= 2 * ROUNDING[dtype] * case.spread
        return jax.nn.one_hot(jnp.where(tie, 1, jnp.where(got.argmax(axis=1) == want.argmax(axis=1), 0, 2)), 3)

    images = np.random.default_rng(2).uniform(size=(3, *case.image_shape)).astype(np.float32)
    settings = vote_settings(
        sigma=0.5,
        num_classes=3,
        n0=100,
        n=300,
        seed=0,
        batch_size=200,
        sampler="float",
        image_shape=case.image_shape,
        devices=jax.devices()[:1],
    )

    def count(ready):
        groups = count_votes(
            compare, (case.variables, ready), images, np.arange(3), settings=settings, devices=jax.devices()[:1]
        )
        return sum((votes.counts0 + votes.counts).sum(axis=0) for votes in groups)

    same, tie, differs = count(case.ready)
    assert (same + tie + differs, differs) == (1200, 0)
    assert tie < {"float32": 4, "bfloat16": 480}[dtype]  # measured: 0 and 311
    assert count(case.fold(change(case.variables, **TWINS["epsilon"])))[2] > 400


# --- what is folded -------------------------------------------------------------------------------------------------


def not_folded(model, image_shape):
    variables = random_variables(model, image_shape)
    affine = flatten_dict(for_inference(model, variables, image_shape=image_shape)[1]["affine"])
    return {"/".join(path[:-1]) for path in affine if path[-1] == "scale"}


@pytest.mark.parametrize(
    ("model", "image_shape", "expected"),
    [
        (*SMALL["cifar_resnet"], set()),
        (*SMALL["resnet"], set()),
        (*SMALL["densenet"], {"dense1_0/bn1", "dense2_0/bn1", "dense3_0/bn1", "bn"}),
        # The shortcut takes conv1's output as well, so layer1_0/bn1 cannot go into conv1 ...
        (*SMALL["wide_resnet"], {"layer1_0/bn1", "layer2_0/bn1", "layer3_0/bn1", "bn1"}),
        # ... but when the shortcut is a projection of what bn1 gives, it can.
        (SMALL["wide_resnet"][0].clone(widen=2), (8, 8, 3), {"layer2_0/bn1", "layer3_0/bn1", "bn1"}),
    ],
)
def test_what_is_folded(model, image_shape, expected):
    assert not_folded(model, image_shape) == expected


def test_lenet_passes_through():
    model, image_shape = SMALL["lenet"]
    variables = random_variables(model, image_shape)
    _, ready = for_inference(model, variables, image_shape=image_shape)
    assert ready["affine"] == {}
    jax.tree.map(np.testing.assert_array_equal, ready["params"], variables["params"])


class Odd(nn.Module):
    """Normalizations that no model of the library has: only the last of them may be folded."""

    @nn.compact
    def __call__(self, x, *, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = norm(name="biased")(nn.Conv(4, (3, 3), name="with_bias")(x))
        shared = nn.Conv(4, (3, 3), use_bias=False, name="shared")
        x = norm(name="first")(shared(x)) + norm(name="second")(shared(x + 1))
        y = nn.Conv(4, (1, 1), use_bias=False, name="used_twice")(x)
        x = norm(name="one_of_two")(y) + y
        together = norm(name="together")
        x = sum(together(nn.Conv(4, (1, 1), use_bias=False, name=name)(x)) for name in ("left", "right"))
        x = nn.relu(nn.Conv(4, (1, 1), use_bias=False, name="activated")(x))
        x = nn.Conv(4, (1, 1), use_bias=False, name="plain")(norm(name="after_relu")(x))
        return norm(name="bare", use_scale=False, use_bias=False, epsilon=1e-3)(x).mean(axis=(1, 2))


def test_unusual_uses_stay_right():
    image_shape, model = (6, 5, 3), Odd()
    variables = random_variables(model, image_shape)
    assert not_folded(model, image_shape) == {"biased", "first", "second", "one_of_two", "together", "after_relu"}
    images = np.random.default_rng(1).normal(size=(4, *image_shape)).astype(np.float32)
    apply_fn, ready = for_inference(model, variables, image_shape=image_shape)
    want, got = jax.jit(model.apply)(variables, images), jax.jit(apply_fn)(ready, images)
    np.testing.assert_allclose(got, want, atol=ROUNDING["float32"] * np.abs(want).max())


# --- what cannot be made ready --------------------------------------------------------------------------------------


class Single(nn.Module):
    """A single layer."""

    layer: nn.Module

    def __call__(self, x, *, train=False):
        return self.layer(x).mean(axis=(1, 2))


class OwnNorm(nn.BatchNorm):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm(use_running_average=False), "batch norm layer does not use its running averages"),
        (nn.BatchNorm(use_running_average=True, axis=1), "batch norm layer has axis=1, only the last one works"),
        (OwnNorm(use_running_average=True), "batch statistics layer/mean belong to no nn.BatchNorm"),
    ],
)
def test_other_batch_statistics_raise(layer, message):
    model = Single(layer)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=message):
        for_inference(model, variables, image_shape=(4, 4, 3))


def test_wrong_variables_and_images_raise():
    model, image_shape = SMALL["cifar_resnet"]
    variables = random_variables(model, image_shape)
    apply_fn, ready = for_inference(model, variables, image_shape=image_shape)
    with pytest.raises(ValueError, match="no affine/bn1 in the variables; use those of for_inference"):
        jax.eval_shape(apply_fn, variables, jnp.zeros((2, *image_shape)))
    with pytest.raises(ValueError, match=r"images of shape \(2, 9, 7, 3\) are not \[N, 8, 7, 3\]"):
        jax.eval_shape(apply_fn, ready, jnp.zeros((2, 9, 7, 3)))
    with pytest.raises(ValueError, match=r"do not fit images of 1 channels"):
        for_inference(model, variables, image_shape=(8, 7, 1))
