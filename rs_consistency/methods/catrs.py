"""CAT-RS: confidence-aware training. Jeong, Kim, Shin (AAAI 2023)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rs_consistency import attacks, losses
from rs_consistency.common.checks import LARGEST, count, number_from
from rs_consistency.methods.base import Batch, Classifier, Method, MethodOutput, Teacher, Terms, pick


def build(config: ConfigDict) -> Terms:
    """Return the sum of a term for examples of low and one for examples of high confidence.

    With w the share of the M copies whose top class is the label, and K ~ Binomial(M, w), at least 1:

    - low: 1/M times the sum of the K smallest of the M cross entropies;
    - high, only where K = M: lbd * max_i KL(P(x) || F(x + d*_i)), d* from `attacks.worst_noise` and P(x) the smoothed
      prediction of the teacher, a Gaussian model.
    """
    settings = config.catrs
    lbd, epsilon, num_steps = settings.lbd, settings.epsilon, settings.num_steps

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        num_copies = batch.noise.shape[0]
        logits = model.noisy(batch.images, batch.noise)
        right = logits.argmax(axis=-1) == batch.labels[None]  # [M, B]
        draws = pick(batch.keys, lambda key: jax.random.uniform(key, (num_copies,)))  # [B, M]
        kept = jnp.maximum((draws < right.mean(axis=0)[:, None]).sum(axis=-1), 1)  # K, [B]

        smallest_first = jnp.sort(losses.cross_entropies(logits, batch.labels), axis=0)
        is_kept = jnp.arange(num_copies)[:, None] < kept[None]
        low = jnp.where(is_kept, smallest_first, 0.0).sum(axis=0) / num_copies

        log_target = jnp.log(batch.extra["smoothed"])  # -inf where the teacher never voted
        noise = attacks.worst_noise(
            model.frozen, batch.images, log_target, batch.noise, epsilon=epsilon, num_steps=num_steps
        )
        divergences = losses.kl_divergence(log_target, model.noisy(batch.images, noise))  # [M, B]
        high = jnp.where(kept == num_copies, divergences.max(axis=0), 0.0)
        return MethodOutput({"low_confidence": low, "high_confidence": lbd * high}, logits)

    return terms


def _check(config: ConfigDict) -> None:
    settings = config.catrs
    number_from("catrs.lbd", settings.lbd, at_least=0, at_most=LARGEST)
    number_from("catrs.epsilon", settings.epsilon, at_least=0, at_most=LARGEST)
    count("catrs.num_steps", settings.num_steps, at_most=1000)
    count("catrs.num_votes", settings.num_votes, at_most=10**8)


METHOD = Method(
    build,
    _check,
    Teacher("catrs.teacher", "catrs.num_votes", "a Gaussian model on the same data (published: at sigma 0.25)"),
)
