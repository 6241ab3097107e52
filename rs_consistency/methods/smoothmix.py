"""SmoothMix: mixes images with adversarial ones and softens their labels. Jeong et al. (NeurIPS 2021)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rs_consistency import attacks, losses
from rs_consistency.common.checks import LARGEST, count, number_above, number_from
from rs_consistency.methods.base import Batch, Classifier, Method, MethodOutput, Terms, pick, warmup


def build(config: ConfigDict) -> Terms:
    """Return the cross entropy at the clean side x', and eta * w * KL(y_mix || F(x_mix + d_i)) where Fbar(x') is right.

    x' is iterate number `clean_step` of the attack, at most `step_size * clean_step * w` away from x; x_adv is the last
    iterate. `x_mix = (1 - u) x' + u x_adv` and `y_mix = (1 - u) Fbar(x') + u / K` with u uniform on [0, 1/2]. w grows
    over the first epochs. The noise is the same throughout, and the gradient flows through Fbar(x').
    """
    settings = config.smoothmix
    step_size, num_steps, clean_step = settings.step_size, settings.num_steps, settings.clean_step
    eta, warmup_epochs = settings.eta, settings.warmup_epochs

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        weight = warmup(batch.epoch, warmup_epochs)
        clean, adversarial = attacks.unbounded(
            model.frozen,
            batch.images,
            batch.labels,
            batch.noise,
            step_size=step_size,
            num_steps=num_steps,
            keep_step=clean_step,
        )
        clean = batch.images + attacks.project(clean - batch.images, step_size * clean_step * weight)
        logits = model.noisy(clean, batch.noise)
        log_mean = losses.log_mean_softmax(logits)  # [B, K]

        share = pick(batch.keys, lambda key: jax.random.uniform(key, maxval=0.5))  # u, [B]
        along_image = share[:, None, None, None]
        mixed = (1 - along_image) * clean + along_image * adversarial
        log_target = jnp.logaddexp(jnp.log1p(-share)[:, None] + log_mean, jnp.log(share / log_mean.shape[-1])[:, None])
        divergence = losses.kl_divergence(log_target, model.noisy(mixed, batch.noise)).mean(axis=0)
        right = log_mean.argmax(axis=-1) == batch.labels
        cross_entropy = losses.cross_entropy(logits, batch.labels)
        mixup = eta * weight * jnp.where(right, divergence, 0.0)
        return MethodOutput({"cross_entropy": cross_entropy, "mixup": mixup}, logits)

    return terms


def _check(config: ConfigDict) -> None:
    settings = config.smoothmix
    number_above("smoothmix.step_size", settings.step_size, 0, at_most=LARGEST)
    count("smoothmix.num_steps", settings.num_steps, at_most=1000)
    count("smoothmix.clean_step", settings.clean_step, at_least=0, at_most=settings.num_steps)
    number_from("smoothmix.eta", settings.eta, at_least=0, at_most=LARGEST)
    count("smoothmix.warmup_epochs", settings.warmup_epochs, at_least=0)


METHOD = Method(build, _check)
