"""ResNet for 32 x 32 images."""

import flax.linen as nn
import jax

from rs_consistency.models.layers import ImageClassifier, Norm, conv


class CifarResNet(ImageClassifier):
    """ResNet of depth 6n + 2: 3x3 convolution with 16 channels, three stages of n blocks with 16, 32, 64 channels.

    Source: He et al. (CVPR 2016), section 4.2, but with a 1x1 convolution on a shortcut whose shape changes, as in
    the models of Cohen et al. (ICML 2019). On 32x32x3 images with K = 10 ResNet-20 has 272,474 parameters and
    ResNet-110 1,730,714.
    """

    depth: int = 20

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[N, K]` of images `[N, H, W, C]`, float in [0, 1] plus noise, of any size."""
        norm = self.batch_norm(train)
        x = conv(self.prepare(images), 16, 3, name="conv1")
        x = nn.relu(norm(name="bn1")(x))
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(features, stride, norm, name=f"layer{stage}_{block}")(x)
        return self.pool_and_classify(x)


class BasicBlock(nn.Module):
    """Residual block: ReLU(shortcut + two 3x3 convolutions with batch normalization)."""

    features: int
    stride: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, ceil(H/stride), ceil(W/stride), features]`."""
        y = conv(x, self.features, 3, stride=self.stride, name="conv1")
        y = nn.relu(self.norm(name="bn1")(y))
        y = conv(y, self.features, 3, name="conv2")
        y = self.norm(name="bn2")(y)
        if x.shape != y.shape:
            x = conv(x, self.features, 1, stride=self.stride, name="downsample_0")
            x = self.norm(name="downsample_1")(x)
        return nn.relu(x + y)
