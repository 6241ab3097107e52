"""Training objectives: pure, per example, on logits of M noisy copies.

Axes: `M` noisy copies, `B` examples, `K` classes. Every function returns one value per example; the caller
reduces. `F_i = softmax(logits[i])` and `Fbar` is the mean of F over the M copies.
"""

import math

import jax
import jax.numpy as jnp

FORMS = ("default", "xent", "kl", "mse")

# Log-probabilities stop here. The differences of finite float32 logits can overflow to -inf, and 0 * inf and
# inf - inf are NaN; 1e30 leaves room for sums over copies and classes and is far below any trainable value.
_FLOOR = -1e30
LARGEST_WEIGHT = 1e6  # keeps the weighted sums of such values finite


def _log_softmax(logits: jax.Array) -> jax.Array:
    """Log softmax over the last axis, in float32 at least; finite for every finite input."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.maximum(jax.nn.log_softmax(logits, axis=-1), _FLOOR)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy, averaged over the noisy copies: the Gaussian objective.

    Source: Cohen, Rosenfeld, Kolter (ICML 2019), training under Gaussian noise.

    Args:
      logits: `[M, B, K]` floating point; the logits of M noisy copies of every example.
      labels: `[B]` integers in 0..K-1.

    Returns:
      `[B]`: `(1/M) sum_i -log F_i[label]`, in nats, in float32 at least. Finite, with finite gradients, for all finite
      logits. Where a label is outside 0..K-1: NaN under `jit`, which cannot raise.

    Raises:
      ValueError: when the shapes do not fit together, or (outside `jit`) a label is outside 0..K-1.
    """
    _check_logits(logits)
    num_classes = logits.shape[2]
    if labels.shape != logits.shape[1:2]:
        raise ValueError(f"labels has shape {labels.shape}; logits {logits.shape} need [B] = {logits.shape[1:2]}")
    known = (labels >= 0) & (labels < num_classes)
    if not isinstance(known, jax.core.Tracer) and not known.all():
        raise ValueError(f"labels={labels[~known][0]}: use whole numbers from 0 to {num_classes - 1}")
    picked = jnp.take_along_axis(_log_softmax(logits), labels[None, :, None], axis=-1)  # [M, B, 1]
    return jnp.where(known, -picked[..., 0].mean(axis=0), jnp.nan)


def consistency(logits: jax.Array, *, lbd: float, eta: float = 0.5, form: str = "default") -> jax.Array:
    """Consistency regularization: how much predictions differ between noisy copies of one example.

    Source: Jeong and Shin (NeurIPS 2020): the regularizer, and the alternatives that they compare it with. With
    `KL = (1/M) sum_i KL(Fbar || F_i)` and `H` the entropy of Fbar:

    | form | value |
    |---|---|
    | `default` | `lbd * KL + eta * H` |
    | `xent` | `lbd * (KL + H)`, the cross entropy between Fbar and the copies |
    | `kl` | `lbd * KL` |
    | `mse` | `lbd * ||F_1 - F_2||^2`, of the first two copies |

    Args:
      logits: `[M, B, K]` floating point.
      lbd: weight of the consistency term, 0 to 1e6.
      eta: weight of the entropy, 0 to 1e6; only the form `default` uses it.
      form: one of the above.

    Returns:
      `[B]`, in nats (`mse`: squared l2 distance), in float32 at least. The gradient flows through Fbar as well.
      Finite, with finite gradients, for all finite logits.

    Raises:
      ValueError: for an unknown form, a weight outside its range, or `M = 1` with `lbd > 0`: one copy is always
        consistent with itself, so the term would silently do nothing.
    """
    _check_logits(logits)
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; use one of {', '.join(FORMS)}")
    if not (0 <= lbd <= LARGEST_WEIGHT and 0 <= eta <= LARGEST_WEIGHT):
        raise ValueError(f"lbd={lbd} and eta={eta} must be from 0 to {LARGEST_WEIGHT:g}")
    num_copies = logits.shape[0]
    if num_copies == 1 and lbd > 0:
        raise ValueError(f"lbd={lbd} needs at least two noisy copies, but logits {logits.shape} have M = 1")

    log_probs = _log_softmax(logits)  # [M, B, K]
    if form == "mse":
        if num_copies == 1:
            return jnp.zeros_like(log_probs[0, :, 0])
        probs = jnp.exp(log_probs[:2])
        return lbd * jnp.square(probs[0] - probs[1]).sum(axis=-1)

    log_mean = jax.nn.logsumexp(log_probs, axis=0) - math.log(num_copies)  # [B, K]
    mean = jnp.exp(log_mean)
    entropy = -(mean * log_mean).sum(axis=-1)
    kl = (mean[None] * (log_mean[None] - log_probs)).sum(axis=-1).mean(axis=0)
    if form == "kl":
        return lbd * kl
    if form == "xent":
        return lbd * (kl + entropy)
    return lbd * kl + eta * entropy


def _check_logits(logits: jax.Array) -> None:
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {logits.shape}; it must be [M, B, K]: copies, examples, classes")
