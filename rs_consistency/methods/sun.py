"""Gaussian training that leaves hard examples out: Sun, Mao, Mueller, Vechev (ICML 2025, arXiv 2410.06895)."""

import numpy as np
from ml_collections import ConfigDict

from rs_consistency import attacks, losses
from rs_consistency.common.checks import LARGEST, count, number_from
from rs_consistency.common.errors import UserError
from rs_consistency.devices.compiler import either
from rs_consistency.methods.base import Accuracy, Batch, Classifier, Method, MethodOutput, Terms
from rs_consistency.models import QUICK_IN_LOOPS
from rs_consistency.statistics.bounds import certified_radius

_ALPHA = 0.1  # of the lower bounds that become weights
_LEAST_SHARE = 0.75  # of right votes, in the weight of an example
_LEAST_VOTES = 14  # with fewer, three quarters of right votes can have a radius of 0


def build(config: ConfigDict) -> Terms:
    """Return the mean over the M copies of CE(f(x + d*_i), y), d* from `attacks.on_sphere`.

    Until epoch (from 0) number discard_epoch, d* is the noise d itself.
    """
    settings = config.sun
    epsilon, num_steps, first_epoch = settings.epsilon, settings.num_steps, settings.discard_epoch

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        noise = either(
            batch.epoch >= first_epoch,
            lambda: attacks.on_sphere(
                model.frozen, batch.images, batch.labels, batch.noise, step_size=epsilon, num_steps=num_steps
            ),
            lambda: batch.noise,
            compiled=config.model in QUICK_IN_LOOPS,
        )
        logits = model.noisy(batch.images, noise)
        return MethodOutput({"cross_entropy": losses.cross_entropy(logits, batch.labels)}, logits)

    return terms


def choose(config: ConfigDict, epoch: int, weights: np.ndarray, accuracy: Accuracy) -> np.ndarray:
    """Return the weights `[N]` of the examples.

    At discard_epoch the examples with a share of right votes below discard_threshold are dropped for good. Then, and
    every weigh_every epochs after it, an example that is kept gets as its weight a rough certified radius at sigma 1:
    Phi^-1 of the lower confidence bound of its accuracy, at alpha 0.1. At least three quarters of the votes count as
    right, so that the weight is above 0. Raise a `UserError` where no example is kept.
    """
    settings = config.sun
    since = epoch - settings.discard_epoch
    if since < 0 or since % settings.weigh_every:
        return weights
    kept = weights > 0
    if since == 0:
        kept = accuracy(settings.discard_votes, kept) >= settings.discard_threshold
        if not kept.any():
            raise UserError(
                f"sun.discard_threshold={settings.discard_threshold}: no training example has that share of right votes"
                f" before epoch {epoch + 1}; use a smaller one, or a larger sun.discard_epoch, in another --workdir"
            )
    votes = settings.weigh_votes
    right = np.maximum(np.rint(accuracy(votes, kept) * votes), np.floor(_LEAST_SHARE * votes))
    return np.where(kept, certified_radius(right, votes, _ALPHA, sigma=1.0), 0.0)


def _check(config: ConfigDict) -> None:
    settings = config.sun
    if config.method == "sun" and settings.discard_epoch >= config.num_epochs:
        raise UserError(
            f"sun.discard_epoch={settings.discard_epoch}: the run has num_epochs={config.num_epochs}, and would drop no"
            " example; use a smaller one"
        )
    number_from("sun.epsilon", settings.epsilon, at_least=0, at_most=LARGEST)
    count("sun.num_steps", settings.num_steps, at_most=1000)
    count("sun.discard_epoch", settings.discard_epoch)
    number_from("sun.discard_threshold", settings.discard_threshold, at_least=0, at_most=1)
    count("sun.discard_votes", settings.discard_votes, at_most=10**8)
    count("sun.weigh_every", settings.weigh_every)
    count("sun.weigh_votes", settings.weigh_votes, at_least=_LEAST_VOTES, at_most=10**8)


METHOD = Method(build, _check, choose=choose)
