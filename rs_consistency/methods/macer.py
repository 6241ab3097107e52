"""MACER: maximizes the certified radius without attacks. Zhai et al. (ICLR 2020)."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from rs_consistency import losses
from rs_consistency.common.checks import LARGEST, boolean, number_above, number_from
from rs_consistency.methods.base import Batch, Classifier, Method, MethodOutput, Terms


def build(config: ConfigDict) -> Terms:
    """Return the two terms of `losses.macer`, the second times lbd.

    With `deferred`, lbd is 0 until after the first drop of the learning rate: up to and including the epoch (from 0)
    number lr_step_size.
    """
    lbd, beta, gamma, deferred = (config.macer[key] for key in ("lbd", "beta", "gamma", "deferred"))
    sigma, last_without = config.sigma, config.optimizer.lr_step_size

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        logits = model.noisy(batch.images, batch.noise)
        classification, robustness = losses.macer(logits, batch.labels, sigma=sigma, beta=beta, gamma=gamma)
        weight = jnp.where(batch.epoch > last_without, lbd, 0.0) if deferred else lbd
        return MethodOutput({"classification": classification, "robustness": weight * robustness}, logits)

    return terms


def _check(config: ConfigDict) -> None:
    number_from("macer.lbd", config.macer.lbd, at_least=0, at_most=LARGEST)
    number_above("macer.beta", config.macer.beta, 0, at_most=LARGEST)
    number_from("macer.gamma", config.macer.gamma, at_least=0, at_most=LARGEST)
    boolean("macer.deferred", config.macer.deferred)


METHOD = Method(build, _check)
