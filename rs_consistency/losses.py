"""Training objectives: pure, per example, on logits of M noisy copies.

Axes: `M` noisy copies, `B` examples, `K` classes. The functions return a value for each example; the caller reduces.
Arrays may be traced by `jit`, `vmap` and `grad`. Numbers, such as weights, may not: they are checked.
`F_i = softmax(logits[i])`, and `Fbar` is the mean of F over the M copies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from rs_consistency.common.checks import LARGEST, any_array, check_all, number_above, number_from, one_of
from rs_consistency.common.errors import UserError

FORMS = ("default", "xent", "kl", "mse")

_MACER_FLOOR = 1e-10  # added to the probability of the label before its logarithm

# The smallest log-probability. Differences of finite float32 logits can overflow to -inf, and 0 * inf and inf - inf are
# NaN. -1e30 leaves room for sums over copies and classes, and is far below any trainable value.
_FLOOR = -1e30


def log_softmax(logits: jax.Array) -> jax.Array:
    """Return the log softmax over the last axis, in float32 at least. It stops at -1e30: finite for every finite input.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> print(losses.log_softmax(jnp.array([0.0, 0.0, 3e38])))
      [-1.e+30 -1.e+30  0.e+00]
    """
    logits = any_array("logits", logits)
    if not logits.ndim:
        raise UserError("logits has shape (); it must be [..., K]: classes on its last axis")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.maximum(jax.nn.log_softmax(logits, axis=-1), _FLOOR)


def log_mean_softmax(logits: jax.Array) -> jax.Array:
    """Return `log Fbar` `[B, K]`, the logarithm of the mean softmax over the M copies of logits `[M, B, K]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]))  # M = 2, B = 1, K = 2
      >>> [round(float(p), 3) for p in jnp.exp(losses.log_mean_softmax(logits))[0]]
      [0.75, 0.25]
    """
    logits = _checked_logits(logits)
    return jax.nn.logsumexp(log_softmax(logits), axis=0) - math.log(logits.shape[0])


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross entropy averaged over the noisy copies: the Gaussian objective.

    Source: Cohen, Rosenfeld, Kolter (ICML 2019), training under Gaussian noise.

    Args:
      logits: `[M, B, K]` floating point, of M noisy copies of every example.
      labels: `[B]` integers in 0..K-1.

    Returns:
      `[B]`: `(1/M) sum_i -log F_i[label]`, in nats, in float32 at least. Finite, with finite gradients, for all finite
      logits; it stops at 1e30, far beyond any trainable value. Under `jit`, which cannot raise, the result is NaN where
      a label is outside 0..K-1.

    Raises:
      UserError: a `ValueError`, when the shapes do not fit together, or (outside `jit`) a label is outside 0..K-1.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]))  # M = 2, B = 1, K = 2
      >>> round(losses.cross_entropy(logits, jnp.array([0])).item(), 3)  # -(log 0.9 + log 0.6) / 2
      0.308
    """
    return cross_entropies(logits, labels).mean(axis=0)


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross entropy `[M, B]` of every noisy copy.

    Arguments, guarantees and errors are as for `cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]))  # M = 2, B = 1, K = 2
      >>> [round(float(copy), 3) for copy in losses.cross_entropies(logits, jnp.array([0]))[:, 0]]
      [0.105, 0.511]
    """
    logits, labels, known = checked_labels(logits, labels)
    picked = jnp.take_along_axis(log_softmax(logits), labels[None, :, None], axis=-1)  # [M, B, 1]
    return jnp.where(known[None], -picked[..., 0], jnp.nan)


def consistency(logits: jax.Array, *, lbd: float, eta: float = 0.5, form: str = "default") -> jax.Array:
    """Return the consistency regularizer: how much predictions differ between noisy copies of an example.

    Source: Jeong and Shin (NeurIPS 2020), with the alternatives of their comparison. Let `H` be the entropy of Fbar,
    and `KL = (1/M) sum_i KL(Fbar || F_i)`:

    | form | value |
    |---|---|
    | `default` | `lbd * KL + eta * H` |
    | `xent` | `lbd * (KL + H)`, the cross entropy between Fbar and the copies |
    | `kl` | `lbd * KL` |
    | `mse` | `lbd * sum_c (F_1c - F_2c)^2`, of the first two copies |

    Args:
      logits: `[M, B, K]` floating point.
      lbd: weight of the consistency term, 0 to 1e6.
      eta: weight of the entropy, 0 to 1e6; only the form `default` uses it.
      form: a form of the table.

    Returns:
      `[B]`, in nats (`mse`: squared l2 distance), in float32 at least. The gradient flows through Fbar as well.
      Finite, with finite gradients, for all finite logits.

    Raises:
      UserError: a `ValueError`, for an unknown form, a weight outside its range, or `M = 1` with `lbd > 0`. A single
        copy is always consistent with itself, so the term would silently do nothing.

    Example:
      The copies of the first image differ. Those of the second are equal, so only the entropy is left.

      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1], [0.9, 0.1]], [[0.6, 0.4], [0.9, 0.1]]]))  # M = 2, B = 2, K = 2
      >>> [round(float(loss), 3) for loss in losses.consistency(logits, lbd=10.0)]
      [0.992, 0.163]
    """
    logits = _checked_logits(logits)
    one_of("form", form, FORMS)
    lbd = number_from("lbd", lbd, at_least=0, at_most=LARGEST)
    eta = number_from("eta", eta, at_least=0, at_most=LARGEST)
    num_copies = logits.shape[0]
    if num_copies == 1 and lbd > 0:
        raise UserError(f"lbd={lbd} needs at least two noisy copies, but logits {logits.shape} have M = 1")

    log_probs = log_softmax(logits)  # [M, B, K]
    if form == "mse":
        probs = jnp.exp(log_probs[:2])
        return lbd * jnp.square(probs[0] - probs[-1]).sum(axis=-1)  # 0 for M = 1, where lbd is 0

    log_mean = jax.nn.logsumexp(log_probs, axis=0) - math.log(num_copies)  # [B, K]
    mean = jnp.exp(log_mean)
    entropy = -(mean * log_mean).sum(axis=-1)
    kl = (mean[None] * (log_mean[None] - log_probs)).sum(axis=-1).mean(axis=0)
    if form == "kl":
        return lbd * kl
    if form == "xent":
        return lbd * (kl + entropy)
    return lbd * kl + eta * entropy


def stability(clean_logits: jax.Array, noisy_logits: jax.Array) -> jax.Array:
    """Return the term of stability training: the cross entropy between predictions on the clean and the noisy image.

    Source: Li, Chen, Wang, Carin (NeurIPS 2019).

    Args:
      clean_logits: `[B, K]`, f(x).
      noisy_logits: `[B, K]`, f(x + d).

    Returns:
      `[B]`: `-sum_c F_c(x) log F_c(x + d)`, in nats, in float32 at least; without a weight. The gradient flows through
      both. Finite, with finite gradients, for all finite logits.

    Raises:
      UserError: a `ValueError`, when the shapes are not two equal `[B, K]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]))  # clean and noisy: B = 1, K = 2
      >>> round(losses.stability(logits[0], logits[1]).item(), 3)  # -(0.9 log 0.6 + 0.1 log 0.4)
      0.551
    """
    clean_logits, noisy_logits = any_array("clean_logits", clean_logits), any_array("noisy_logits", noisy_logits)
    if clean_logits.ndim != 2 or clean_logits.shape != noisy_logits.shape:
        raise UserError(
            f"clean_logits {clean_logits.shape} and noisy_logits {noisy_logits.shape} must both be [B, K]: examples,"
            " classes"
        )
    return -(jnp.exp(log_softmax(clean_logits)) * log_softmax(noisy_logits)).sum(axis=-1)


def macer(
    logits: jax.Array, labels: jax.Array, *, sigma: float, beta: float, gamma: float
) -> tuple[jax.Array, jax.Array]:
    """Return the two terms of MACER: the error of the smoothed classifier, and a hinge on its certified radius.

    Source: Zhai et al. (ICLR 2020). Let `p1 >= p2` be the two largest entries of the mean over the copies of
    `softmax(beta * logits[i])`:

        classification = -log(Fbar_y + 1e-10)
        robustness     = (sigma / 2) * (gamma - (Phi^-1(p1) - Phi^-1(p2)))

    The robustness counts only for examples whose class of p1 is the label and whose `Phi^-1(p1) - Phi^-1(p2)` is finite
    and at most gamma. For all others value and gradient are 0.

    Args:
      logits: `[M, B, K]` floating point, K at least 2.
      labels: `[B]` integers in 0..K-1.
      sigma: standard deviation of the noise; the robustness term is in its units.
      beta: inverse temperature of the second softmax, above 0 and at most 1e6.
      gamma: the hinge, 0 to 1e6.

    Returns:
      (classification `[B]` in nats, robustness `[B]` in units of sigma, without its weight lbd). Finite, with
      finite gradients, for all finite logits. Under `jit` the classification is NaN where a label is outside 0..K-1.

    Raises:
      UserError: a `ValueError`, when the shapes do not fit, a number is outside its range, or (outside `jit`) a label
        is.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]))  # M = 2, B = 1, K = 2
      >>> terms = losses.macer(logits, jnp.array([0]), sigma=0.5, beta=1.0, gamma=8.0)
      >>> [round(term.item(), 3) for term in terms]  # -log 0.75, and (8 - 2 * 0.674) / 4
      [0.288, 1.663]
    """
    logits, labels, known = checked_labels(logits, labels)
    if logits.shape[2] < 2:
        raise UserError(f"logits {logits.shape} have one class; MACER compares the two largest")
    sigma, beta = number_above("sigma", sigma, 0, at_most=LARGEST), number_above("beta", beta, 0, at_most=LARGEST)
    gamma = number_from("gamma", gamma, at_least=0, at_most=LARGEST)
    of_label = jnp.take_along_axis(log_mean_softmax(logits), labels[:, None], axis=-1)[:, 0]
    classification = jnp.where(known, -jnp.log(jnp.exp(of_label) + _MACER_FLOOR), jnp.nan)

    # The floor comes before the product with beta: differences of finite logits can overflow, and so can the product.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    relative = jnp.maximum(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)), _FLOOR)
    probs = jax.nn.softmax(beta * relative, axis=-1).mean(axis=0)  # [B, K]
    first = probs.argmax(axis=-1)
    others = probs * (1 - jax.nn.one_hot(first, probs.shape[-1], dtype=probs.dtype))
    # Phi^-1(p1) = -Phi^-1(1 - p1), and 1 - p1 is the sum of the other classes: exact where p1 rounds to 1.
    rest, second = others.sum(axis=-1), others.max(axis=-1)
    gap = jax.lax.stop_gradient(-ndtri(rest) - ndtri(second))
    counted = (first == labels) & jnp.isfinite(gap) & (gap <= gamma)
    # Other examples get a harmless value before Phi^-1, so that no infinite derivative meets a zero.
    rest, second = jnp.where(counted, rest, 0.5), jnp.where(counted, second, 0.5)
    robustness = jnp.where(counted, sigma / 2 * (gamma + ndtri(rest) + ndtri(second)), 0.0)
    return classification, robustness


def kl_divergence(log_target: jax.Array, logits: jax.Array) -> jax.Array:
    """Return the KL divergence from a target distribution to the prediction on every noisy copy.

    Args:
      log_target: `[B, K]`, logarithm of the target; -inf stands for a probability of 0.
      logits: `[M, B, K]` floating point.

    Returns:
      `[M, B]`: `KL(target || F_i)`, in nats. The gradient flows through both. Finite, with finite gradients, for all
      finite logits.

    Raises:
      UserError: a `ValueError`, when the shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> logits = jnp.log(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]))  # M = 2, B = 1, K = 2
      >>> divergence = losses.kl_divergence(losses.log_mean_softmax(logits), logits)
      >>> round(divergence.mean().item(), 3)  # the consistency form `kl` at lbd = 1
      0.071
    """
    logits, log_target = _checked_logits(logits), any_array("log_target", log_target)
    if log_target.shape != logits.shape[1:]:
        raise UserError(f"log_target has shape {log_target.shape}; logits {logits.shape} need {logits.shape[1:]}")
    log_target = jnp.maximum(log_target, _FLOOR)
    return (jnp.exp(log_target)[None] * (log_target[None] - log_softmax(logits))).sum(axis=-1)


def checked_labels(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits, labels `[B]`, and whether they are classes; a `UserError` for labels that cannot be any.

    Under `jit` their values are not known, and outside of it they are read.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import losses
      >>> losses.checked_labels(jnp.zeros((2, 3, 4)), jnp.array([0, 1, 4]))
      Traceback (most recent call last):
        ...
      rs_consistency.common.errors.UserError: labels=4: use whole numbers from 0 to 3
    """
    logits, labels = _checked_logits(logits), any_array("labels", labels, kinds="iu")
    num_classes = logits.shape[2]
    if labels.shape != logits.shape[1:2]:
        raise UserError(f"labels has shape {labels.shape}; logits {logits.shape} need [B] = {logits.shape[1:2]}")
    if labels.dtype.itemsize < 4:  # for the comparison with K
        labels = labels.astype(jnp.int32)
    known = (labels >= 0) & (labels < num_classes)
    if not isinstance(known, jax.core.Tracer):
        check_all("labels", labels, np.asarray(known), f"use whole numbers from 0 to {num_classes - 1}")
    return logits, labels, known


def _checked_logits(logits: jax.Array) -> jax.Array:
    logits = jnp.asarray(any_array("logits", logits, "[M, B, K]: copies, examples, classes"))
    if not logits.shape[0] or not logits.shape[2]:
        raise UserError(f"logits has shape {logits.shape}; it needs at least one copy and one class")
    return logits
