"""The smallest model with batch statistics: a step of it compiles in a fraction of a ResNet's time."""

import flax.linen as nn

from rs_consistency.models.layers import ImageClassifier, conv


class Normalized(ImageClassifier):
    """Two convolutions with batch normalization, named as a ResNet's first."""

    @nn.compact
    def __call__(self, images, *, train=False):
        norm, x = self.batch_norm(train), self.prepare(images)
        for number in (1, 2):
            x = nn.relu(norm(name=f"bn{number}")(conv(x, 8, 3, stride=2, name=f"conv{number}")))
        return self.pool_and_classify(x)
