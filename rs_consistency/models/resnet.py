"""ResNet for ImageNet."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from rs_consistency.models.layers import ImageClassifier, Norm, conv


class ResNet(ImageClassifier):
    """7x7 convolution and 3x3 max pooling, both with stride 2; four stages of bottleneck blocks, 256 to 2048 channels.

    Source: He et al. (CVPR 2016), with the stride on the 3x3 convolution of a block as in torchvision. ResNet-50
    has 3, 4, 6 and 3 blocks: with K = 1000 25,557,032 parameters.
    """

    blocks: Sequence[int] = (3, 4, 6, 3)  # in each stage

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[N, K]` of images `[N, H, W, C]`, float in [0, 1] plus noise, at least 32 x 32."""
        norm = self.batch_norm(train)
        x = conv(self.prepare(images, min_size=32), 64, 7, stride=2, name="conv1")
        x = nn.relu(norm(name="bn1")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = Bottleneck(32 * 2**stage, stride, norm, name=f"layer{stage}_{block}")(x)
        return self.pool_and_classify(x)


class Bottleneck(nn.Module):
    """Residual block: ReLU(shortcut + 1x1, 3x3 and 1x1 convolutions with batch normalization)."""

    features: int
    stride: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, ceil(H/stride), ceil(W/stride), 4 * features]`."""
        y = conv(x, self.features, 1, name="conv1")
        y = nn.relu(self.norm(name="bn1")(y))
        y = conv(y, self.features, 3, stride=self.stride, name="conv2")
        y = nn.relu(self.norm(name="bn2")(y))
        y = conv(y, 4 * self.features, 1, name="conv3")
        y = self.norm(name="bn3")(y)
        if x.shape != y.shape:
            x = conv(x, 4 * self.features, 1, stride=self.stride, name="downsample_0")
            x = self.norm(name="downsample_1")(x)
        return nn.relu(x + y)
