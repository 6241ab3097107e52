"""LeNet for 28 x 28 images, as in the published MNIST experiments."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rs_consistency.models.convolution import convolution
from rs_consistency.models.layers import ImageClassifier, dense, fan_in_uniform, max_pool_2x2


class LeNet(ImageClassifier):
    """Two 5x5 convolutions (20, 50 channels), each with ReLU and 2x2 max pooling; dense 500; dense K.

    Source: the MNIST experiments of Jeong and Shin (NeurIPS 2020). On 28x28x1 images with K = 10 it has 431,080
    parameters. Weights and biases start uniform in +-1/sqrt(fan_in). The published models do not normalize their
    input. There is no batch normalization, so `axis_name` has no effect.
    """

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[N, K]` of images `[N, H, W, C]`, float in [0, 1] plus noise, at least 16 x 16."""
        del train  # no layer of this model behaves differently in training
        x = self.prepare(images, min_size=16)
        for features, columns in ((20, 4), (50, 2)):
            fan_in = 5 * 5 * x.shape[-1]
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                dtype=self.dtype,
                kernel_init=fan_in_uniform(fan_in),
                bias_init=fan_in_uniform(fan_in),
                conv_general_dilated=convolution(columns),
            )(x)
            # ReLU and maximum commute; on the pooled array ReLU costs a quarter.
            x = nn.relu(max_pool_2x2(x))
        x = jnp.reshape(x, (x.shape[0], -1))  # [N, H, W, C] -> [N, H*W*C]
        x = nn.relu(dense(x, 500))
        return dense(x.astype(jnp.float32), self.num_classes)
