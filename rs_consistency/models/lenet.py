"""LeNet for 28 x 28 images, as in the published MNIST experiments."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from rs_consistency.models.layers import fan_in_uniform, max_pool_2x2, normalize


class LeNet(nn.Module):
    """Two 5x5 convolutions (20, 50 channels), each with ReLU and 2x2 max pooling; dense 500; dense K.

    Source: the MNIST experiments of Jeong and Shin (NeurIPS 2020). On 28x28x1 images with K = 10 it has 431,080
    parameters. Weights and biases start uniform in +-1/sqrt(fan_in).

    Attributes:
      num_classes: K.
      mean: per-channel mean of the input normalization; empty for none (the published MNIST models).
      std: per-channel standard deviation of it.
    """

    num_classes: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Images `[N, H, W, C]`, float in [0, 1] plus noise, to logits `[N, K]`."""
        del train  # no layer of this model behaves differently in training
        x = normalize(images, self.mean, self.std)
        for features in (20, 50):
            fan_in = 5 * 5 * x.shape[-1]
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                kernel_init=fan_in_uniform(fan_in),
                bias_init=fan_in_uniform(fan_in),
            )(x)
            # ReLU and maximum commute; on the pooled array it costs a quarter.
            x = nn.relu(max_pool_2x2(x))
        x = jnp.reshape(x, (x.shape[0], -1))  # [N, H, W, C] -> [N, H*W*C]
        x = nn.relu(self._dense(500, x))
        return self._dense(self.num_classes, x)

    def _dense(self, features: int, x: jax.Array) -> jax.Array:
        init = fan_in_uniform(x.shape[-1])
        return nn.Dense(features, kernel_init=init, bias_init=init)(x)
