"""The models against float64 references of plain sums, their parameter counts, initial weights, bfloat16."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency import UserError
from rs_consistency.models import MODELS, create_model
from rs_consistency.models.layers import average_pool_2x2, max_pool_2x2
from rs_consistency.models.wide_resnet import WideResNet
from tests.references import (
    Reference,
    random_variables,
    reference_cifar_resnet,
    reference_densenet,
    reference_lenet,
    reference_resnet50,
    reference_wide_resnet,
    shapes,
    small_model,
)


@pytest.fixture(scope="module")
def lenet():
    model = create_model("lenet", num_classes=10)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


def test_lenet_equals_the_reference(lenet):
    model, variables = lenet
    images = np.random.default_rng(0).normal(size=(3, 28, 28, 1))
    got = model.apply(variables, jnp.asarray(images, jnp.float32), train=False)
    np.testing.assert_allclose(got, reference_lenet(variables["params"], images), atol=1e-5)  # float32 sums of 800


def test_lenet_has_the_published_size(lenet):
    assert sum(leaf.size for leaf in jax.tree.leaves(lenet[1])) == 431_080


def test_lenet_starts_uniform_in_one_over_the_root_of_fan_in(lenet):
    for name, fan_in in {"Conv_0": 25, "Conv_1": 500, "Dense_0": 800, "Dense_1": 500}.items():
        for kind, leaf in lenet[1]["params"][name].items():
            bound = 1 / np.sqrt(fan_in)
            assert np.abs(leaf).max() <= bound
            if kind == "kernel":  # the standard deviation of a uniform distribution, within 5 standard errors
                assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=5 / np.sqrt(leaf.size))


def test_normalization_is_part_of_the_model(lenet):
    _, variables = lenet
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 28, 28, 1)), jnp.float32)
    plain = create_model("lenet", num_classes=10).apply(variables, (images - 0.3) / 0.2)
    inside = create_model("lenet", num_classes=10, mean=(0.3,), std=(0.2,)).apply(variables, images)
    np.testing.assert_allclose(inside, plain, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 5, 2)])
def test_max_pool_equals_flax_in_value_and_gradient(shape):
    x = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3])))
    for pool in (max_pool_2x2, lambda x: nn.max_pool(x, (2, 2), (2, 2))):
        value, gradient = jax.value_and_grad(lambda x, pool=pool: (weights * pool(x)).sum())(x)
        if pool is max_pool_2x2:
            mine = value, gradient
    np.testing.assert_array_equal(mine[0], value)
    np.testing.assert_array_equal(mine[1], gradient)


def test_average_pool_leaves_out_the_odd_last_row_and_column():
    x = np.random.default_rng(4).normal(size=(2, 7, 5, 3))
    want = (x[:, :6:2, :4:2] + x[:, 1:6:2, :4:2] + x[:, :6:2, 1:4:2] + x[:, 1:6:2, 1:4:2]) / 4
    np.testing.assert_allclose(average_pool_2x2(jnp.asarray(x, jnp.float32)), want, atol=1e-6)  # rounding of four terms


# --- parameter counts -------------------------------------------------------------------------------------------


def count(layers, classes):
    """Parameters of a network from its convolutions (in, out, k), batch norm widths and last width."""
    convs, norms, last = layers
    return sum(a * b * k * k for a, b, k in convs) + 2 * sum(norms) + (last + 1) * classes


def cifar_resnet_layers(depth):
    convs, norms, width = [(3, 16, 3)], [16], 16
    for out in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            convs += [(width, out, 3), (out, out, 3)] + [(width, out, 1)] * (width != out)
            norms += [out, out] + [out] * (width != out)
            width = out
    return convs, norms, width


def wide_resnet_layers(depth, widen):
    convs, norms, width = [(3, 16, 3)], [], 16
    for out in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            convs += [(width, out, 3), (out, out, 3)] + [(width, out, 1)] * (width != out)
            norms += [width, out]
            width = out
    return convs, [*norms, width], width


def densenet_layers():
    widths = [24 + 12 * layer for layer in range(18)]
    convs = [(3, 24, 3)] + [one for width in widths for one in ((width, 48, 1), (48, 12, 3))]
    return convs, [*widths, *[48] * 18, 240], 240


def resnet50_layers():
    convs, norms, width = [(3, 64, 7)], [64], 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs += [(width, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1)]
            norms += [inner, inner, 4 * inner]
            if block == 0:
                convs.append((width, 4 * inner, 1))
                norms.append(4 * inner)
            width = 4 * inner
    return convs, norms, width


@pytest.mark.parametrize(
    ("name", "image_shape", "classes", "layers", "parameters"),
    [
        ("resnet20", (32, 32, 3), 10, cifar_resnet_layers(20), 272_474),
        ("resnet110", (32, 32, 3), 10, cifar_resnet_layers(110), 1_730_714),
        ("densenet40", (32, 32, 3), 10, densenet_layers(), 211_978),
        ("wideresnet28_10", (32, 32, 3), 10, wide_resnet_layers(28, 10), 36_479_194),  # the authors' 36.5 million
        ("resnet50", (224, 224, 3), 1000, resnet50_layers(), 25_557_032),  # torchvision's count
    ],
)
def test_parameter_counts(name, image_shape, classes, layers, parameters):
    variables = shapes(create_model(name, num_classes=classes), image_shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters == count(layers, classes)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == 2 * sum(layers[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


# --- forward passes against plain sums --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "image_shape", "reference"),
    [
        (create_model("resnet20", num_classes=10), (16, 16, 3), functools.partial(reference_cifar_resnet, depth=20)),
        (create_model("resnet20", num_classes=10), (7, 9, 1), functools.partial(reference_cifar_resnet, depth=20)),
        (create_model("densenet40", num_classes=10), (14, 10, 3), reference_densenet),
        (create_model("resnet50", num_classes=10), (48, 32, 3), reference_resnet50),
        (WideResNet(num_classes=10, depth=16, widen=2), (8, 8, 3), functools.partial(reference_wide_resnet, depth=16)),
    ],
    ids=["resnet20", "resnet20-odd", "densenet40", "resnet50", "wideresnet"],
)
def test_inference_equals_the_reference(model, image_shape, reference):
    variables = random_variables(model, image_shape)
    images = np.random.default_rng(1).normal(size=(2, *image_shape)).astype(np.float32)
    got = jax.jit(model.apply)(variables, images)
    want = reference(Reference(variables), np.float64(images))
    assert got.shape == (2, 10)
    # Float32 rounding, 6e-8, through up to 50 layers, each a sum of up to 4,608 terms.
    np.testing.assert_allclose(got, want, atol=5e-6 * np.abs(want).max())


# --- initial weights --------------------------------------------------------------------------------------------


def test_convolutions_start_normal_and_batch_norm_as_the_identity():
    key = jax.random.key(0, impl="rbg")  # compiles ten times faster than threefry
    variables = jax.jit(small_model().init)(key, jnp.zeros((1, 8, 8, 3)))
    kernels = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        name = "/".join(key.key for key in path)
        if leaf.ndim == 4:
            kernels += 1
            size, _, _, features = leaf.shape
            scaled = np.float64(leaf) * np.sqrt(size * size * features / 2)
            # Moments of a standard normal distribution: 1 and 3, within 5 standard errors.
            assert np.mean(scaled**2) == pytest.approx(1, abs=5 * np.sqrt(2 / leaf.size)), name
            assert np.mean(scaled**4) == pytest.approx(3, abs=5 * np.sqrt(96 / leaf.size)), name
        elif name.endswith(("scale", "var")):
            assert (leaf == 1).all()
        elif "fc" not in name:
            assert (leaf == 0).all()
        else:
            assert 0 < np.abs(leaf).max() <= 1 / np.sqrt(64)  # PyTorch's: the bias is random too
    assert kernels == 9


# --- bfloat16 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "image_shape"), [("lenet", (28, 28, 1)), ("resnet20", (8, 8, 3))])
def test_bfloat16_is_for_the_activations_alone(name, image_shape):
    half = create_model(name, num_classes=10, mean=(0.5,) * image_shape[-1], std=(0.2,) * image_shape[-1])
    full, half = half, half.clone(dtype=jnp.bfloat16)
    variables = random_variables(half, image_shape)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = np.random.default_rng(1).uniform(size=(16, *image_shape)).astype(np.float32)
    want, got = (jax.jit(model.apply)(variables, images) for model in (full, half))
    assert got.dtype == want.dtype == jnp.float32
    # Each of up to 20 layers rounds to 8 bits, 0.2 percent, in sequence; not zero, or it was float32 all along.
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.03
    # The last layer is float32: logits in bfloat16 would be unchanged by this.
    assert (np.asarray(got) != np.asarray(jnp.asarray(got, jnp.bfloat16), np.float32)).mean() > 0.9


# --- what a model cannot take -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_shape", "size"),
    [
        ("lenet", (15, 28, 1), 16),
        ("densenet40", (8, 3, 3), 4),
        ("resnet50", (28, 28, 1), 32),
        ("resnet20", (0, 4, 3), 1),
    ],
)
def test_images_that_are_too_small(name, image_shape, size):
    height, width, _ = image_shape
    message = f"images of {height} x {width} pixels are too small, the model takes {size} x {size} and larger"
    with pytest.raises(ValueError, match=message):
        shapes(create_model(name, num_classes=10), image_shape)


@pytest.mark.parametrize(("name", "size"), [("lenet", 16), ("densenet40", 4), ("resnet50", 32), ("resnet20", 1)])
def test_the_smallest_images(name, size):
    model = create_model(name, num_classes=10)
    variables = shapes(model, (size, size, 1))
    assert jax.eval_shape(model.apply, variables, jnp.zeros((2, size, size, 1))).shape == (2, 10)


def test_images_of_another_shape_than_the_model_s():
    with pytest.raises(ValueError, match=r"images of shape \(1, 32, 32\) are not \[N, H, W, C\]"):
        shapes(create_model("resnet20", num_classes=10), (32, 32))
    with pytest.raises(ValueError, match=r"mean=\(0.5, 0.5, 0.5\) and std=.* do not fit images of 1 channels"):
        shapes(create_model("resnet20", num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3), (32, 32, 1))


def test_an_unknown_model_is_named(monkeypatch):
    monkeypatch.delitem(MODELS, "linear")  # which is of the tests
    known = "densenet40, lenet, resnet110, resnet20, resnet50, wideresnet28_10"
    with pytest.raises(UserError, match=f"model='vgg' is unknown; use one of {known}"):
        create_model("vgg", num_classes=10)
