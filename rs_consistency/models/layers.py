"""Building blocks that several models share."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rs_consistency.common.checks import any_array

# `norm(name="bn1")` makes a batch normalization layer, ready for training or inference.
Norm = Callable[..., nn.BatchNorm]


class ImageClassifier(nn.Module):
    """The attributes and the first and last layers that the models share.

    A name such as `layer1_0` stands for PyTorch's `layer1.0`.

    Attributes:
      num_classes: K.
      mean: per-channel mean of the input normalization; empty for none.
      std: per-channel standard deviation, likewise.
      dtype: float32 or bfloat16, for the activations. Parameters, batch statistics, input normalization, the last
        layer and the logits are float32.
      axis_name: vmap and pmap axes over which batch statistics are averaged in training; empty for none.
    """

    num_classes: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    dtype: Any = jnp.float32
    axis_name: Sequence[str] = ()

    def prepare(self, images: jax.Array, *, min_size: int = 1) -> jax.Array:
        """Return normalized images `[N, H, W, C]` in `dtype`. Raise a ValueError for images that do not fit."""
        images = any_array("images", images, kinds="biuf")
        if images.ndim != 4:
            raise ValueError(f"images of shape {images.shape} are not [N, H, W, C]")
        height, width = images.shape[1:3]
        if min(height, width) < min_size:
            raise ValueError(
                f"images of {height} x {width} pixels are too small, the model takes {min_size} x {min_size} and larger"
            )
        return self.normalize(images.astype(jnp.float32)).astype(self.dtype)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Return `(images - mean) / std` per channel, or the images if `mean` is empty.

        Normalization is part of the model because noise and radii are in units of the [0, 1] image. `for_inference`
        replaces this method by a multiply-add.
        """
        mean, std = tuple(self.mean), tuple(self.std)
        if not mean:
            return images
        if not len(mean) == len(std) == images.shape[-1]:  # a grey image would silently broadcast to three channels
            raise ValueError(f"mean={mean} and std={std} do not fit images of {images.shape[-1]} channels")
        mean, std = (jnp.asarray(values, images.dtype)[None, None, None] for values in (mean, std))
        return (images - mean) / std

    def batch_norm(self, train: bool) -> Norm:
        """Return batch normalization: batch statistics in training, running averages (0.9 old + 0.1 new) otherwise."""
        return functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=tuple(self.axis_name) or None,
        )

    def pool_and_classify(self, x: jax.Array) -> jax.Array:
        """Return float32 logits `[N, K]`: the mean over the pixels of `[N, H, W, C]`, then the dense layer `fc`."""
        # float32 costs nothing beside the convolutions, and bfloat16 logits would tie or change the top class.
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return dense(x, self.num_classes, name="fc")


def fan_in_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Return an initializer, uniform in +-1/sqrt(fan_in): PyTorch's default for weights and biases."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(x: jax.Array, features: int, *, name: str | None = None) -> jax.Array:
    """Apply a dense layer in the type of x, `[N, C]` to `[N, features]`, initialized as PyTorch's."""
    init = fan_in_uniform(x.shape[-1])
    return nn.Dense(features, dtype=x.dtype, kernel_init=init, bias_init=init, name=name)(x)


def conv(x: jax.Array, features: int, size: int, *, stride: int = 1, name: str) -> jax.Array:
    """Apply a convolution without bias in the type of x.

    It maps `[N, H, W, C]` to `[N, ceil(H/stride), ceil(W/stride), features]`. Its kernel, `size` x `size` with an odd
    size, starts normal with variance 2 / (size * size * features).
    """
    # PyTorch's padding. With a stride of 2 and even H, flax's "SAME" pads less on the left and shifts the output.
    padding = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        use_bias=False,
        dtype=x.dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )(x)


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Return the 2x2 maximum with stride 2 over `[N, H, W, C]`. An odd last row or column is left out.

    It is a reshape and a reduction instead of `flax.linen.max_pool`: XLA's backward pass of `reduce_window` on the CPU
    made a LeNet training step 2.1 times slower (5,260 against 2,470 images/s on 2 cores).
    """
    return _windows_2x2(x).max(axis=(2, 4))


def average_pool_2x2(x: jax.Array) -> jax.Array:
    """Return the 2x2 mean with stride 2 over `[N, H, W, C]`. An odd last row or column is left out."""
    return _windows_2x2(x).mean(axis=(2, 4))


def _windows_2x2(x: jax.Array) -> jax.Array:
    n, h, w, c = x.shape
    x = x[:, : h - h % 2, : w - w % 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c)  # [N, H, W, C] -> [N, H/2, 2, W/2, 2, C]
