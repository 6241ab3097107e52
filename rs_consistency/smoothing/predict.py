"""Prediction of a smoothed classifier, with abstention and without a radius."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from rs_consistency import noise
from rs_consistency.common.checks import PRECISIONS, check_all, probability
from rs_consistency.smoothing.images import prepare
from rs_consistency.statistics.bounds import ABSTAIN, ALPHA, N, check_counts, most_of_others, p_value_of
from rs_consistency.statistics.limits import check_predictions
from rs_consistency.statistics.samplers import GRID


class Prediction(NamedTuple):
    """The predictions for B images.

    Attributes:
      prediction: `[B]` int64, the class; `ABSTAIN` (-1) where the votes are too close.
      p_value: `[B]` float64, p-value of the two-sided test that the two most voted classes are equally probable.
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
    sampler: str = GRID,
    precision: str = PRECISIONS[0],
    batch_size: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Prediction:
    """Predict with the smoothed version of a classifier, or abstain.

    Guarantee: for each image, with probability at least 1 - alpha over the noise, the prediction is `ABSTAIN` or the
    class that the smoothed classifier gives. The statement is about one image.

    Source: PREDICT of Cohen, Rosenfeld, Kolter (ICML 2019), proposition 2. The class with the most of n votes is
    predicted if the two-sided binomial test at 1/2 of the two largest counts has a p-value of at most alpha.

    The noise differs from the noise of `certify` and `decide`: predictions are independent of their certificates.

    A linear classifier abstains on its plane:

    >>> import numpy as np
    >>> from rs_consistency import predict
    >>> is_bright = lambda images: (images.mean(axis=(1, 2)) - 0.5) * np.float32([[-1, 1]])
    >>> images = np.stack([np.full((4, 4, 1), level, np.uint8) for level in (25, 128, 230)])
    >>> predict(is_bright, images, sigma=0.5, num_classes=2, n=100).prediction
    array([ 0, -1,  1])

    `n` is the number of votes on an image. The other arguments, and the errors, are as for `rs_consistency.certify`.

    Returns:
      NumPy arrays, see `Prediction`.
    """
    alpha = probability("alpha", alpha)
    settings = {"sigma": sigma, "num_classes": num_classes, "n": n, "seed": seed, "batch_size": batch_size}
    settings |= {"sampler": sampler, "precision": precision, "progress": progress}
    task = prepare(apply_fn, images, indices, devices, **settings)
    check_predictions(task.settings.n, alpha=alpha, slack=task.settings.law.slack)
    votes = task.all_votes(apply_fn, noise.Stream.PREDICT, "predicting", progress)
    return conclude_prediction(votes.counts, alpha=alpha, slack=task.settings.law.slack)


def conclude_prediction(counts: ArrayLike, *, alpha: float, slack: float = 0.0) -> Prediction:
    """Return predictions and p-values from votes `[B, K]`; see `predict`, and `bounds.p_value_of` for the slack.

    | counts | p-value |
    |---|---|
    | two equal largest | 1: abstains |
    | all n for one class, also for K = 1 | 2 ** (1 - n) + n * slack, at most 1 |

    Raises:
      UserError: for counts other than whole numbers `[B, K]`, or an image without votes.
    """
    alpha = probability("alpha", alpha)
    counts = check_counts("counts", counts)
    check_all("votes of an image", counts.sum(axis=1), counts.sum(axis=1) >= 1, "use at least 1")
    most = counts.argmax(axis=1)
    n = counts.sum(axis=1)
    p_value = p_value_of(counts.max(axis=1), most_of_others(counts, most), n=n, slack=slack)
    return Prediction(np.where(p_value <= alpha, most, ABSTAIN), p_value, counts)
