"""Wide ResNet for 32 x 32 images: about 130 times the parameters of ResNet-20."""

import flax.linen as nn
import jax

from rs_consistency.models.layers import ImageClassifier, Norm, conv


class WideResNet(ImageClassifier):
    """Pre-activation ResNet of depth 6n + 4: 3x3 convolution with 16 channels, three stages of n blocks, no dropout.

    Source: Zagoruyko and Komodakis (BMVC 2016). The stages have 16, 32, 64 times `widen` channels. On 32x32x3
    images with K = 10 WRN-28-10 has 36,479,194 parameters.
    """

    depth: int = 28
    widen: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[N, K]` of images `[N, H, W, C]`, float in [0, 1] plus noise, of any size."""
        norm = self.batch_norm(train)
        x = conv(self.prepare(images), 16, 3, name="conv1")
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                x = PreActivationBlock(features * self.widen, stride, norm, name=f"layer{stage}_{block}")(x)
        x = nn.relu(norm(name="bn1")(x))
        return self.pool_and_classify(x)


class PreActivationBlock(nn.Module):
    """Residual block: shortcut + (batch norm, ReLU, 3x3 convolution) twice."""

    features: int
    stride: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, ceil(H/stride), ceil(W/stride), features]`."""
        y = nn.relu(self.norm(name="bn1")(x))
        if x.shape[-1] != self.features:  # as in the authors' code, a projection gets the activated input
            x = conv(y, self.features, 1, stride=self.stride, name="shortcut")
        y = conv(y, self.features, 3, stride=self.stride, name="conv1")
        y = nn.relu(self.norm(name="bn2")(y))
        return x + conv(y, self.features, 3, name="conv2")
