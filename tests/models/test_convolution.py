"""The convolutions in other forms against plain sums in float64, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency.models.convolution import as_matrix_product, inference_convolution, winograd_rows


def reference(images, kernel, strides, padding):
    images = np.pad(np.float64(images), ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(images, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nhwcij,ijcf->nhwf", windows[:, :: strides[0], :: strides[1]], np.float64(kernel))


def draw(image_shape, kernel_shape):
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=image_shape)), np.float32(rng.normal(size=kernel_shape))


def assert_close(got, want, scale=1.0):
    """Within float32 rounding of sums as large as these."""
    np.testing.assert_allclose(got, want, atol=scale * 2e-6 * np.abs(want).max())


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "strides", "padding"),
    [
        ((2, 12, 12, 20), (5, 5, 20, 7), (1, 1), "VALID"),
        ((2, 9, 7, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
        ((2, 8, 9, 3), (1, 1, 3, 4), (2, 2), ((0, 0), (0, 0))),
        ((1, 6, 10, 3), (3, 2, 3, 4), (1, 2), ((2, 0), (0, 1))),
        ((1, 7, 7, 2), (3, 3, 2, 4), (2, 2), "SAME"),
    ],
)
def test_a_matrix_product_is_the_convolution(image_shape, kernel_shape, strides, padding, columns):
    images, kernel = draw(image_shape, kernel_shape)
    got = as_matrix_product(jnp.asarray(images), jnp.asarray(kernel), strides=strides, padding=padding, columns=columns)
    pads = {"VALID": ((0, 0), (0, 0)), "SAME": ((1, 1), (1, 1))}.get(padding, padding)
    assert_close(got, reference(images, kernel, strides, pads))


def test_the_gradients_of_a_matrix_product_are_those_of_the_convolution():
    images, kernel = map(jnp.asarray, draw((2, 12, 12, 3), (5, 5, 3, 4)))

    def gradients(convolve):
        return jax.grad(lambda *args: jnp.sin(convolve(*args)).sum(), argnums=(0, 1))(images, kernel)

    mine = gradients(lambda *args: as_matrix_product(*args, strides=(1, 1), padding="VALID", columns=4))
    layout = ("NHWC", "HWIO", "NHWC")
    theirs = gradients(lambda *args: jax.lax.conv_general_dilated(*args, (1, 1), "VALID", dimension_numbers=layout))
    for got, want in zip(mine, theirs, strict=True):
        assert_close(got, np.asarray(want), scale=4)  # the sine of sums that round differently


@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((3, 1), (2, 0))])
def test_winograd_along_the_rows_is_the_convolution(padding):
    images, kernel = draw((2, 12, 12, 20), (5, 5, 20, 7))
    got = winograd_rows(jnp.asarray(images), jnp.asarray(kernel), padding=padding)
    assert_close(got, reference(images, kernel, (1, 1), padding), scale=4)


@pytest.mark.parametrize("settings", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 2}, {"lhs_dilation": (2, 1)}])
def test_dilation_and_groups_are_not_lost(settings):
    images, kernel = draw((2, 8, 8, 32), (3, 3, 32 // settings.get("feature_group_count", 1), 8))
    arguments = (jnp.asarray(images), jnp.asarray(kernel), (1, 1), ((1, 1), (1, 1)))
    settings = {**settings, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    np.testing.assert_array_equal(
        inference_convolution(*arguments, **settings), jax.lax.conv_general_dilated(*arguments, **settings)
    )


@pytest.mark.parametrize(
    ("image_shape", "size", "strides"),
    [
        ((2, 8, 8, 3), 3, 1),
        ((2, 8, 8, 32), 3, 1),
        ((2, 7, 7, 16), 3, 1),
        ((2, 7, 7, 32), 3, 1),
        ((2, 8, 8, 32), 3, 2),
        ((2, 8, 8, 32), 1, 2),
        ((2, 8, 8, 1), 5, 1),
        ((2, 8, 8, 20), 5, 1),
        ((2, 7, 7, 20), 5, 1),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_inference_every_shape_is_the_convolution(image_shape, size, strides, dtype):
    images, kernel = draw(image_shape, (size, size, image_shape[-1], 8))
    pads = ((size // 2,) * 2,) * 2
    images, kernel = jnp.asarray(images, dtype), jnp.asarray(kernel, dtype)
    got = inference_convolution(images, kernel, (strides,) * 2, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert got.dtype == dtype
    want = reference(np.float32(images), np.float32(kernel), (strides,) * 2, pads)
    assert_close(np.float32(got), want, scale=4 if dtype == jnp.float32 else 2**-8 / 2e-6)
