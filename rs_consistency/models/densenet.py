"""DenseNet for 32 x 32 images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rs_consistency.models.layers import ImageClassifier, Norm, average_pool_2x2, conv


class DenseNet(ImageClassifier):
    """3x3 convolution with 24 channels; three dense blocks of bottleneck layers of growth 12; batch norm and ReLU.

    Source: Huang et al. (CVPR 2017), DenseNet-B. Between the blocks there is only a 2x2 average pool: nothing is
    compressed, so there is no 1x1 convolution. DenseNet-40 has 6 layers in a block, and 211,978 parameters on 32x32x3
    images with K = 10.
    """

    layers: int = 6  # in a block

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[N, K]` of images `[N, H, W, C]`, float in [0, 1] plus noise, at least 4 x 4."""
        norm = self.batch_norm(train)
        x = conv(self.prepare(images, min_size=4), 24, 3, name="conv1")
        for block in (1, 2, 3):
            if block > 1:
                x = average_pool_2x2(x)
            for layer in range(self.layers):
                x = DenseLayer(12, norm, name=f"dense{block}_{layer}")(x)
        x = nn.relu(norm(name="bn")(x))
        return self.pool_and_classify(x)


class DenseLayer(nn.Module):
    """A layer that appends `growth` channels: batch norm, ReLU, 1x1 convolution; batch norm, ReLU, 3x3 convolution."""

    growth: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H, W, C + growth]`."""
        y = nn.relu(self.norm(name="bn1")(x))
        y = conv(y, 4 * self.growth, 1, name="conv1")
        y = nn.relu(self.norm(name="bn2")(y))
        y = conv(y, self.growth, 3, name="conv2")
        return jnp.concatenate([x, y], axis=-1)
