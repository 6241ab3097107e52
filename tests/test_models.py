"""LeNet against a float64 reference of plain sums, its parameter count and its initial weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency import UserError
from rs_consistency.models import create_model
from rs_consistency.models.layers import max_pool_2x2


@pytest.fixture(scope="module")
def lenet():
    model = create_model("lenet", num_classes=10)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


def reference_lenet(params, x):
    for name in ("Conv_0", "Conv_1"):
        kernel, bias = np.float64(params[name]["kernel"]), np.float64(params[name]["bias"])
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))  # [N, H', W', C, 5, 5]
        x = np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias, 0)
        corners = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        x = np.max(corners, axis=0)
    x = x.reshape(len(x), -1)
    x = np.maximum(x @ np.float64(params["Dense_0"]["kernel"]) + np.float64(params["Dense_0"]["bias"]), 0)
    return x @ np.float64(params["Dense_1"]["kernel"]) + np.float64(params["Dense_1"]["bias"])


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


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="model='vgg' is unknown; use one of lenet"):
        create_model("vgg", num_classes=10)
