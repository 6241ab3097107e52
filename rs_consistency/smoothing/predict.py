"""Prediction of a smoothed classifier, with abstention; no radius."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from rs_consistency import noise
from rs_consistency.common.checks import check_all, number_array, probability
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.certify import ABSTAIN, prepare
from rs_consistency.statistics.bounds import ALPHA, N, p_value_of


class Prediction(NamedTuple):
    """What `predict` returns for B images.

    Attributes:
      prediction: `[B]` int64, the class; `ABSTAIN` (-1) where the votes are too close.
      p_value: `[B]` float64, of the two-sided test that the two most voted classes are equally probable.
      counts: `[B, K]` int64, the n votes.
    """

    prediction: np.ndarray
    p_value: np.ndarray
    counts: np.ndarray


def predict(
    apply_fn: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    sigma: float,
    num_classes: int,
    n: int = N,
    alpha: float = ALPHA,
    seed: int = 0,
    batch_size: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Prediction:
    """Predicts with the smoothed version of a classifier, or abstains.

    Guarantee: for each image, with probability at least 1 - alpha over the noise, the prediction is `ABSTAIN` or the
    class that the smoothed classifier gives. The statement is about one image.

    Source: PREDICT of Cohen, Rosenfeld, Kolter (ICML 2019), proposition 2: n votes; the class with the most is
    predicted if the two-sided binomial test at 1/2 of the two largest counts has a p-value of at most alpha.

    The noise is not that of `certify` and `decide`: the predictions are independent of their certificates.

    Args:
      apply_fn: a function that JAX can trace, `[N, H, W, C]` float32 -> logits `[N, K]`; normalization is part of it.
      images: `[B, H, W, C]`, in [0, 1].
      sigma: standard deviation of the noise, in units of the images.
      num_classes: K.
      n: votes.
      alpha: error probability of one image's statement, in (0, 1), at least 1e-100.
      seed: of the noise.
      batch_size: noisy images at a time; None for a choice by device. No effect on the votes.
      indices: `[B]`, numbers that address the images' noise, 0..B-1 by default.
      devices: local devices that share the work; None for all.
      progress: show a progress bar on stderr.

    Returns:
      NumPy arrays, see `Prediction`.

    Raises:
      UserError: a `ValueError`, for settings or images outside their range, a model that does not fit
        images and num_classes, or one that gives NaN.
    """
    alpha = probability("alpha", alpha)
    task = prepare(
        images,
        indices,
        devices,
        sigma=sigma,
        num_classes=num_classes,
        n0=0,
        least_n0=0,
        n=n,
        seed=seed,
        batch_size=batch_size,
    )
    votes = task.all_votes(apply_fn, noise.Stream.PREDICT, "predicting" if progress else None)
    return conclude_prediction(votes.counts, alpha=alpha)


def conclude_prediction(counts: ArrayLike, *, alpha: float) -> Prediction:
    """Prediction and p-value from the votes `[B, K]`; see `predict`.

    | counts | p-value |
    |---|---|
    | two equal largest | 1: abstains |
    | all n for one class | 2 ** (1 - n), at most 1; so is it for K = 1 |

    Raises:
      UserError: when the counts are not whole numbers `[B, K]`, or an image has none.
    """
    alpha = probability("alpha", alpha)
    counts = number_array("counts", counts)
    if counts.ndim != 2 or not counts.shape[1]:
        raise UserError(f"counts has shape {counts.shape}; it must be [B, K]")
    check_all(
        "counts",
        counts,
        np.isfinite(counts) & (counts >= 0) & (counts == np.floor(counts)),
        "use whole numbers of at least 0",
    )
    counts = counts.astype(np.int64)
    check_all("votes of an image", counts.sum(axis=1), counts.sum(axis=1) >= 1, "use at least 1")
    two = np.sort(np.pad(counts, ((0, 0), (1, 0))), axis=1)[:, -2:]  # [B, 2], the runner-up first; 0 for K = 1
    runner_up, most = two.T.astype(np.float64)
    p_value = p_value_of(most, runner_up)
    return Prediction(np.where(p_value <= alpha, counts.argmax(axis=1), ABSTAIN), p_value, counts)
