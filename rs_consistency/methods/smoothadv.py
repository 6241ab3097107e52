"""SmoothAdv: Gaussian augmentation around adversarial images. Salman et al. (NeurIPS 2019)."""

from ml_collections import ConfigDict

from rs_consistency import attacks, losses
from rs_consistency.common.checks import LARGEST, count, number_from
from rs_consistency.methods.base import Batch, Classifier, Method, MethodOutput, Terms, warmup


def build(config: ConfigDict) -> Terms:
    """Return the mean over the M copies of CE(f(x + a + d_i), y), a from `attacks.smooth_adv` with the same noise.

    The attack's radius grows over the first epochs: `min(epsilon, (epoch + 1) * epsilon / warmup_epochs)`. With the
    consistency term the attack is the form of Jeong and Shin, which was published with it.
    """
    epsilon, num_steps, warmup_epochs = (config.smoothadv[key] for key in ("epsilon", "num_steps", "warmup_epochs"))
    with_consistency = config.consistency.lbd > 0
    num_examples = config.batch_size // config.num_noise

    def terms(model: Classifier, batch: Batch) -> MethodOutput:
        images = attacks.smooth_adv(
            model.frozen,
            batch.images,
            batch.labels,
            batch.noise,
            epsilon=epsilon * warmup(batch.epoch, warmup_epochs),
            num_steps=num_steps,
            keys=None if with_consistency else batch.keys,
            mean_over=num_examples,
        )
        logits = model.noisy(images, batch.noise)
        return MethodOutput({"cross_entropy": losses.cross_entropy(logits, batch.labels)}, logits)

    return terms


def _check(config: ConfigDict) -> None:
    number_from("smoothadv.epsilon", config.smoothadv.epsilon, at_least=0, at_most=LARGEST)
    count("smoothadv.num_steps", config.smoothadv.num_steps, at_most=1000)
    count("smoothadv.warmup_epochs", config.smoothadv.warmup_epochs, at_least=0)


METHOD = Method(build, _check)
