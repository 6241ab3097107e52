"""Stability training: cross entropy on the clean image, and agreement with the noisy one. Li et al. (NeurIPS 2019)."""

import jax
from ml_collections import ConfigDict

from rs_consistency import losses
from rs_consistency.common.checks import LARGEST, number_from
from rs_consistency.methods.base import Batch, Classifier, Method, MethodOutput, Terms


def build(config: ConfigDict) -> Terms:
    """Return CE(f(x), y) + lbd * CE(target = F(x), prediction = f(x + d)).

    The second term is a mean over the M copies (published: 1). As published, the clean and the noisy images go through
    the model one after the other: batch norm sees two batches.
    """
    lbd = config.stability.lbd

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        clean = model.clean(batch.images)
        noisy = model.noisy(batch.images, batch.noise)
        agreement = jax.vmap(losses.stability, in_axes=(None, 0))(clean, noisy).mean(axis=0)
        cross_entropy = losses.cross_entropy(clean[None], batch.labels)
        return MethodOutput({"cross_entropy": cross_entropy, "stability": lbd * agreement}, noisy)

    return terms


def _check(config: ConfigDict) -> None:
    number_from("stability.lbd", config.stability.lbd, at_least=0, at_most=LARGEST)


METHOD = Method(build, _check)
