"""Convolutions in other forms, where XLA's own is slow: on the CPU.

All of them take `[N, H, W, C]` and `[kh, kw, C, F]` and give the sums of `jax.lax.conv_general_dilated` up to the
order of their terms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def convolution(columns: int) -> Callable[..., jax.Array]:
    """What convolves in a `flax.linen.Conv(conv_general_dilated=...)`, chosen by platform.

    On the CPU a matrix product that computes `columns` neighbouring output pixels at once: see `as_matrix_product`.
    LeNet, one core of an Intel Xeon, medians: forward 1.5 times as many images a second as XLA's convolution, gradient
    of the parameters 1.9 times, gradient of the images 2.7 times. Elsewhere XLA's convolution.

    Args:
      columns: at most so many output pixels of a row at once.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated

    def convolve(
        images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **settings: Any
    ) -> jax.Array:
        plain = all(settings.get(name) in (None, 1, (1, 1)) for name in ("lhs_dilation", "rhs_dilation"))
        if not plain or settings.get("feature_group_count", 1) != 1:
            raise ValueError(f"only for convolutions without dilation and groups, not {settings}")
        return as_matrix_product(images, kernel, strides=strides, padding=padding, columns=columns)

    return convolve


def as_matrix_product(
    images: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Any, columns: int
) -> jax.Array:
    """A convolution `[N, H, W, C]` * `[kh, kw, C, F]` -> `[N, H', W', F]` as one matrix product.

    A row of the left matrix is a window that `c` neighbouring output pixels see, c being the largest divisor of W'
    up to `columns`; the right matrix `[kh * window, c * F]` holds the kernel c times, shifted, and zeros elsewhere.
    Compared with one window for each pixel (c = 1), less is copied and the product has more columns, at the price
    of multiplications by those zeros.

    Args:
      images: `[N, H, W, C]`.
      kernel: `[kh, kw, C, F]`, of the same type.
      strides: of rows and columns.
      padding: `VALID`, `SAME`, or (before, after) for rows and columns.
      columns: at most so many output pixels at once.

    Returns:
      The sums of `jax.lax.conv_general_dilated`, up to the order of their terms.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
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


def inference_convolution(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """What convolves in inference, for `flax.linen.Conv(conv_general_dilated=...)`, chosen by platform and shape.

    On the CPU, float32 3 x 3 convolutions of stride 1 that keep the size take another form: with 16 channels or less
    `in_pairs`, with more `winograd_rows`. ResNet-20 then classifies 1.2 to 1.25 times as many images a second as with
    XLA's convolution alone (one core of an Intel Xeon, batches of 16 to 64). Elsewhere it is XLA's convolution.
    """
    height, width, channels = images.shape[1:]
    same = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and [tuple(side) for side in padding] == [(1, 1)] * 2
    if jax.default_backend() == "cpu" and same and images.dtype == jnp.float32:
        if channels <= _FEW_CHANNELS and width % 2 == 0:
            return in_pairs(images, kernel)
        if channels > _FEW_CHANNELS and height % _TILE == 0:
            return winograd_rows(images, kernel)
    return jax.lax.conv_general_dilated(images, kernel, strides, padding, **settings)


_FEW_CHANNELS = 16
_TILE = 4  # output rows at a time
_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Winograd's F(4, 3), interpolation points 0, 1, -1, 2, -2 and infinity: Lavin and Gray (CVPR 2016).
_INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0))
_INPUT += ((0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))
_KERNEL = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))  # times 1/24
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def winograd_rows(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3 x 3 convolution that keeps the size, four output rows at a time with half the multiplications.

    Along the height Winograd's F(4, 3): six 1 x 3 convolutions of sums of rows instead of twelve of rows. Along the
    width it stays a convolution, so that all sums are of whole rows, which lie side by side in memory.

    Args:
      images: `[N, H, W, C]`, H a multiple of 4.
      kernel: `[3, 3, C, F]`.

    Returns:
      `[N, H, W, F]`. Its rounding errors are about twice those of the plain sum.

    Source: Lavin and Gray, Fast algorithms for convolutional neural networks (CVPR 2016).
    """
    n, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (0, 0), (0, 0)))
    last = height - _TILE + 1
    rows = [padded[:, row : row + last : _TILE] for row in range(_TILE + 2)]  # of every tile: [N, H/4, W, C]
    kernels = jnp.einsum("ti,ijcf->tjcf", jnp.asarray(np.array(_KERNEL) / 24, kernel.dtype), kernel)
    products = [
        jax.lax.conv_general_dilated(
            _sum(weights, rows), kernels[point, None], (1, 1), ((0, 0), (1, 1)), dimension_numbers=_LAYOUT
        )
        for point, weights in enumerate(_INPUT)
    ]
    tiles = jnp.stack([_sum(weights, products) for weights in _OUTPUT], axis=2)  # [N, H/4, 4, W, F]
    return tiles.reshape(n, height, width, kernel.shape[-1])


def _sum(weights: Sequence[int], arrays: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum, without the terms of weight 0."""
    terms = [array if weight == 1 else weight * array for weight, array in zip(weights, arrays, strict=True) if weight]
    return sum(terms[1:], start=terms[0])


def in_pairs(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3 x 3 convolution that keeps the size, as one of half the width and twice the channels.

    Two neighbouring pixels become one of 2C channels, without a copy but for the padding; the kernel `[3, 2, 2C, 2F]`
    holds the given one twice, shifted, with zeros elsewhere: a third more multiplications, in a matrix product of a
    better shape.

    Args:
      images: `[N, H, W, C]`, W even.
      kernel: `[3, 3, C, F]`.

    Returns:
      `[N, H, W, F]`.
    """
    n, height, width, channels = images.shape
    features = kernel.shape[-1]
    padded = jnp.pad(images, ((0, 0), (0, 0), (1, 1), (0, 0))).reshape(n, height, width // 2 + 1, 2 * channels)
    shifted = [jnp.pad(kernel, ((0, 0), (place, 1 - place), (0, 0), (0, 0))) for place in (0, 1)]
    paired = jnp.stack(shifted, axis=3).reshape(3, 2, 2 * channels, 2 * features)
    found = jax.lax.conv_general_dilated(padded, paired, (1, 1), ((1, 1), (0, 0)), dimension_numbers=_LAYOUT)
    return found.reshape(n, height, width, features)
