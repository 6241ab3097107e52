"""Decisions at one radius, with a number of votes that depends on the image."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.common.checks import PRECISIONS, probability
from rs_consistency.smoothing.images import join, prepare
from rs_consistency.smoothing.pool import Decisions, check_radius, decide_images
from rs_consistency.statistics.bounds import ALPHA, N0, N
from rs_consistency.statistics.limits import check_decisions
from rs_consistency.statistics.samplers import GRID


def decide(
    apply_fn: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    sigma: float,
    radius: float,
    num_classes: int,
    n0: int = N0,
    n: int = N,
    alpha: float = ALPHA,
    seed: int = 0,
    sampler: str = GRID,
    precision: str = PRECISIONS[0],
    batch_size: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Decisions:
    """Decide for each image whether the smoothed classifier is certified at one radius, with few votes.

    Guarantee: for each image, over the noise: if the smoothed classifier does not predict the selected class
    everywhere within `radius`, then the decision is 1 with probability at most alpha. If the selected class has a
    probability greater than Phi(radius / sigma), so that enough votes could certify it, then the decision is -1 with
    probability at most alpha. See `rs_consistency.statistics.sequential.decide` for the test.

    n0 votes select the class, as in `certify`. The further votes are the same as in `certify`. The test looks at them
    after every 16, until there is a decision or there are n. An image far from the radius takes tens of votes, an image
    near it many.

    A linear classifier, whose true radius is the distance to its plane, 1.6 and 0.4:

    >>> import numpy as np
    >>> from rs_consistency import decide
    >>> is_bright = lambda images: (images.mean(axis=(1, 2)) - 0.5) * np.float32([[-1, 1]])
    >>> images = np.stack([np.full((4, 4, 1), level, np.uint8) for level in (25, 153)])
    >>> result = decide(is_bright, images, sigma=0.5, radius=1.0, num_classes=2, n0=10, n=1000)
    >>> result.decision, result.votes
    (array([ 1, -1], dtype=int8), array([464,  32]))

    `radius` is an l2 distance, at least 0, in units of the images, and `n` the most further votes. A batch of noisy
    images is made of blocks of 16 on each device; `batch_size` can only decide near-ties. The other arguments, and
    the errors, are as for `rs_consistency.certify`.

    Returns:
      NumPy arrays in the order of the images, see `Decisions`.
    """
    settings = {"sigma": sigma, "num_classes": num_classes, "n0": n0, "n": n, "seed": seed, "batch_size": batch_size}
    settings |= {"sampler": sampler, "precision": precision, "progress": progress}
    task = prepare(apply_fn, images, indices, devices, least_n0=1, **settings)
    radius, alpha = check_radius(radius), probability("alpha", alpha)
    check_decisions(task.settings.n, radius=radius, alpha=alpha, **task.settings.law._asdict())
    asked = (lambda _, batch: apply_fn(batch), (), task.images, task.indices)
    groups = decide_images(*asked, settings=task.settings, radius=radius, alpha=alpha, devices=task.devices)
    none = np.zeros(0, np.int64)
    no_counts = np.zeros((0, task.settings.num_classes), np.int64)
    no_decisions = Decisions(none, none, none, no_counts, none, none, np.zeros(0, np.int8))
    decided = join(no_decisions, groups, "deciding", len(task.images), progress)
    order = np.argsort(decided.positions)
    return Decisions(*(part[order] for part in decided))
