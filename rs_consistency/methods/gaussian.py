"""Gaussian augmentation: cross entropy on noisy copies. Cohen, Rosenfeld, Kolter (ICML 2019)."""

from ml_collections import ConfigDict

from rs_consistency import losses
from rs_consistency.methods.base import Batch, Classifier, Method, MethodOutput, Terms


def build(config: ConfigDict) -> Terms:
    """Return the mean over the M copies of CE(f(x + d_i), y)."""
    del config

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        logits = model.noisy(batch.images, batch.noise)
        return MethodOutput({"cross_entropy": losses.cross_entropy(logits, batch.labels)}, logits)

    return terms


METHOD = Method(build)
