"""Convolutions in other forms, where XLA's own is slow: on the CPU, and on a GPU in small batches.

All of them take `[N, H, W, C]` and `[kh, kw, C, F]` and return the sums of `jax.lax.conv_general_dilated`, up to the
order of the terms.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def convolution(columns: int) -> Callable[..., jax.Array]:
    """Return the convolution for a `flax.linen.Conv(conv_general_dilated=...)`, chosen by platform.

    On CPUs and GPUs it is `as_matrix_product`, for up to `columns` neighbouring output pixels at once. LeNet, one core
    of an Intel Xeon, medians: forward 1.5 times as many images a second as XLA's convolution, gradient of the
    parameters 1.9 times, gradient of the images 2.7 times. On one NVIDIA H100, 256 noisy images in a step: 1.5 times as
    many Gaussian steps a second, 1.6 times as many of SmoothAdv. Elsewhere it is XLA's convolution.
    """
    if jax.default_backend() not in ("cpu", "gpu"):
        return jax.lax.conv_general_dilated

    def convolve(
        images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **settings: Any
    ) -> jax.Array:
        if not _is_plain(settings):
            raise ValueError(f"only for convolutions without dilation and groups, not {settings}")
        return as_matrix_product(images, kernel, strides=strides, padding=padding, columns=columns)

    return convolve


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Return whether settings of `jax.lax.conv_general_dilated` have neither dilation nor groups."""
    plain = all(settings.get(name) in (None, 1, (1, 1)) for name in ("lhs_dilation", "rhs_dilation"))
    return plain and settings.get("feature_group_count", 1) == settings.get("batch_group_count", 1) == 1


def as_matrix_product(
    images: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Any, columns: int
) -> jax.Array:
    """Return a convolution `[N, H, W, C]` * `[kh, kw, C, F]` -> `[N, H', W', F]`, computed as one matrix product.

    The padding is `VALID`, `SAME`, or (before, after) for rows and columns. A row of the left matrix is a window that
    `c` neighbouring output pixels see; c is the largest divisor of W' up to `columns`. The right matrix
    `[kh * window, c * F]` holds the kernel c times, shifted, and zeros elsewhere. Compared with a window for each pixel
    (c = 1), less is copied and the product has more columns, at the price of multiplications by these zeros.
    """
    padding = _pads(images, kernel, strides, padding)
    if any(amount for side in padding for amount in side):
        images = jnp.pad(images, ((0, 0), *map(tuple, padding), (0, 0)))
    n, height, width, channels = images.shape
    size_h, size_w, _, features = kernel.shape
    stride_h, stride_w = strides
    rows, total = (height - size_h) // stride_h + 1, (width - size_w) // stride_w + 1
    columns = next(c for c in range(min(columns, total), 0, -1) if total % c == 0)
    window = (columns - 1) * stride_w + size_w

    flat = images.reshape(n, height, width * channels)
    windows = []  # for each block of columns [N, H', kh, window * C]
    for block in range(total // columns):
        first = block * columns * stride_w * channels
        part = flat[:, :, first : first + window * channels]
        seen = [part[:, row : row + (rows - 1) * stride_h + 1 : stride_h] for row in range(size_h)]
        windows.append(jnp.stack(seen, axis=2))
    left = jnp.stack(windows, axis=2).reshape(n * rows * (total // columns), size_h * window * channels)

    shifted = [
        jnp.pad(kernel, ((0, 0), (column * stride_w, window - size_w - column * stride_w), (0, 0), (0, 0)))
        for column in range(columns)
    ]
    right = jnp.stack(shifted, axis=3).reshape(size_h * window * channels, columns * features)
    return (left @ right).reshape(n, rows, total, features)


def _pads(images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> tuple[tuple[int, int], ...]:
    """Return (before, after) for rows and columns, from any form of padding."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    return tuple((int(before), int(after)) for before, after in padding)


def inference_convolution(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """Convolve in inference, as `flax.linen.Conv(conv_general_dilated=...)`, in a form that suits platform and shape.

    On the CPU, float32 5 x 5 convolutions of stride 1 take another form, `winograd_rows` or `as_matrix_product`: LeNet
    classifies 1.6 times as many images a second as with XLA's convolution alone (one core of an Intel Xeon, batches of
    32 to 128). All others are XLA's: ResNet-20 ran 1.6 to 1.8 times slower with `winograd_rows` (two cores), LeNet on
    an H100 in batches of 16,384 0.4 to 0.7 times as fast with `as_matrix_product`.
    """
    channels, size = images.shape[-1], kernel.shape[:2]
    simple = _is_plain(settings) and images.dtype == jnp.float32 and tuple(strides) == (1, 1)
    if jax.default_backend() == "cpu" and simple and size == (5, 5):
        pads = _pads(images, kernel, strides, padding)
        rows = images.shape[1] + sum(pads[0]) - size[0] + 1
        if channels > _FEW_CHANNELS and rows % _TILE == 0:
            return winograd_rows(images, kernel, padding=pads)
        return as_matrix_product(images, kernel, strides=strides, padding=pads, columns=_TILE)
    return jax.lax.conv_general_dilated(images, kernel, strides, padding, **settings)


_FEW_CHANNELS = 16
_TILE = 4  # output rows, or columns, at a time
_TAPS = 5


def winograd_rows(images: jax.Array, kernel: jax.Array, *, padding: Sequence[Sequence[int]]) -> jax.Array:
    """Return a convolution `[N, H, W, C]` * `[5, 5, C, F]` -> `[N, H', W', F]` of stride 1; H' is a multiple of 4.

    It takes four output rows at a time, with 2/5 of the multiplications and a few times the rounding errors of the
    plain sum. Along the height it is Winograd's F(4, 5): eight 1 x 5 convolutions of sums of rows instead of twenty of
    rows. Along the width it stays a convolution, so that all sums are of whole rows, which are contiguous in memory.

    Source: Lavin and Gray, Fast algorithms for convolutional neural networks (CVPR 2016).
    """
    padded = jnp.pad(images, ((0, 0), *map(tuple, padding), (0, 0)))
    height = padded.shape[1] - _TAPS + 1
    of_images, of_kernel, of_products = _cook_toom()
    # Row i of every tile: [N, H'/4, W, C].
    rows = [padded[:, row : row + height - _TILE + 1 : _TILE] for row in range(_TILE + _TAPS - 1)]
    kernels = jnp.einsum("ti,ijcf->tjcf", jnp.asarray(of_kernel, kernel.dtype), kernel)
    products = []
    for point, weights in enumerate(of_images):
        row = _sum(weights, rows)
        products.append(as_matrix_product(row, kernels[point, None], strides=(1, 1), padding="VALID", columns=2))
    tiles = jnp.stack([_sum(weights, products) for weights in of_products], axis=2)  # [N, H'/4, 4, W', F]
    return tiles.reshape(len(images), height, tiles.shape[3], kernel.shape[-1])


@functools.cache
def _cook_toom() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the matrices of F(4, 5) for images `[8, 8]`, kernels `[8, 5]` and products `[4, 8]`.

    `of_products @ ((of_kernel @ k) * (of_images @ x))` is the correlation of x with k. It is the transposed product of
    two polynomials, from interpolation at seven points and at infinity.
    """
    points = (0, 1, -1, 2, -2, 0.5, -0.5)

    def evaluate(count: int) -> np.ndarray:
        """Return polynomials of `count` coefficients at the points and, at infinity, their leading coefficient."""
        return np.vstack([np.vander(points, count, increasing=True), np.eye(count)[-1:]])

    images = np.linalg.inv(evaluate(len(points) + 1)).T
    scale = np.abs(images).max(axis=1, keepdims=True)  # sums of images with small weights round less
    return np.round(images / scale, 12), evaluate(_TAPS) * scale, evaluate(_TILE).T


def _sum(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    """Return the weighted sum, without the terms of weight 0."""
    pairs = zip(map(float, weights), arrays, strict=True)
    terms = [array if weight == 1 else weight * array for weight, array in pairs if weight]
    return sum(terms[1:], start=terms[0])
