"""An attack on a smoothed classifier: the nearest image found that it gives another class, proven by votes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rs_consistency import noise
from rs_consistency.common.checks import MAX_INDEX, PRECISIONS, probability
from rs_consistency.smoothing.images import Task, join, prepare
from rs_consistency.smoothing.predict import Prediction, conclude_prediction
from rs_consistency.smoothing.search import (
    COPIES,
    RESTARTS,
    STEPS,
    Effort,
    Occasion,
    check_effort,
    compile_step,
    jobs_per_device,
    norms_of,
    search,
)
from rs_consistency.smoothing.voter import ApplyFn, to_float
from rs_consistency.smoothing.votes import VoteProgram, VoteSettings, count_votes, vote_program
from rs_consistency.statistics.bounds import ABSTAIN, ALPHA, ATTACK_TESTS
from rs_consistency.statistics.limits import check_attacks
from rs_consistency.statistics.samplers import GRID

N_ATTACK = 10_000
_GROUPS = 2  # images in a group, in units of the searches at a time: a kill loses at most a group

_SCALES = 7  # of the refinement
_SPAN = 0.4  # of their norms around the distance that was found, in sigmas
_SPARE = 1.8  # standard deviations of the votes by which a candidate should pass the test


class Attacks(NamedTuple):
    """The attacks on B images.

    Attributes:
      prediction: `[B]` int64, class of the smoothed classifier at the image; `ABSTAIN` (-1) without a proof, and then
        there is nothing to attack.
      adversarial: `[B]` int64, its class at the adversarial image; -1 where no image with another class was proven.
      distance: `[B]` float64, l2 distance of the adversarial image, rounded up; infinite where none was proven.
      images: `[B, H, W, C]`, the adversarial images, and the image itself where none was proven: uint8 for the sampler
        "grid", else float32 in [0, 1].
      p_value: `[B]` float64, of the test at the adversarial image; of the last try where none was proven; 1 without.
      counts: `[B, K]` int64, the n votes of that test; 0 without.
    """

    prediction: np.ndarray
    adversarial: np.ndarray
    distance: np.ndarray
    images: np.ndarray
    p_value: np.ndarray
    counts: np.ndarray


def attack(
    apply_fn: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    sigma: float,
    num_classes: int,
    n: int = N_ATTACK,
    alpha: float = ALPHA,
    copies: int = COPIES,
    steps: int = STEPS,
    restarts: int = RESTARTS,
    seed: int = 0,
    sampler: str = GRID,
    precision: str = PRECISIONS[0],
    batch_size: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Attacks:
    """Attack the smoothed version of a classifier: find near images that it gives another class, and prove it.

    The distance bounds the true robust radius of the smoothed classifier from above, as a certificate bounds it from
    below. A certificate of the same class with a radius above the distance is contradicted.

    Guarantee: for each image, with probability at least 1 - alpha over the votes, both hold: the prediction is
    `ABSTAIN` or the class that the smoothed classifier gives at the image, and `adversarial` is -1 or the class that it
    gives at the adversarial image. So a certificate at alpha' and an attack contradict each other with probability at
    most alpha + alpha', unless something is broken. Nothing is guaranteed about the search: there may be nearer images.

    The search minimizes the norm of the perturbation. A step follows the gradient of the log mean softmax of the best
    other class over that of the prediction, over `copies` noisy copies, fresh in every step. The norm then changes by
    the radius that the votes of these copies give the iterate: up where they are for the prediction, down where they
    are for another class. All iterates stay in [0, 1]. The first restart begins at the image, the others near it. Then
    votes on multiples of the best perturbation tell its smallest length, and n fresh votes prove the class with the
    test of `predict`. A candidate that is not proven is moved away and tried again. The tests at the image and at up to
    4 candidates have an error probability of alpha / 5 each, all with fresh votes.

    Source: the rule that direction and norm have separate steps is of Rony et al. (CVPR 2019); the gradient of the mean
    softmax, of Salman et al. (NeurIPS 2019).

    A linear classifier, whose plane is at a distance of 0.39:

    >>> import numpy as np
    >>> from rs_consistency import attack
    >>> is_bright = lambda images: (images.mean(axis=(1, 2)) - 0.5) * np.float32([[-1, 1]])
    >>> images = np.full((1, 4, 4, 1), 152, np.uint8)
    >>> found = attack(is_bright, images, sigma=0.5, num_classes=2, n=2000, steps=10, restarts=1)
    >>> found.prediction, found.adversarial, bool(0.39 < found.distance[0] < 0.5)
    (array([1]), array([0]), True)

    Args:
      apply_fn: as for `rs_consistency.certify`, and differentiable. Where the gradient is zero, a step follows the
        noise of the copies that vote for another class, which needs many copies.
      images: as for `certify`.
      sigma: as for `certify`.
      num_classes: K.
      n: votes of a test. For the sake of the proof, the image is about 7 sigma / sqrt(n) beyond the boundary.
      alpha: error probability of one image's statement, in (0, 1), at least 1e-100.
      copies: M, noisy copies in a step of the search.
      steps: steps of a restart.
      restarts: searches from different points, at least 1.
      seed: seed of all noise; the noise differs from that of `certify`, `decide` and `predict`.
      sampler: as for `certify`. With "grid", adversarial images have whole levels from 0 to 255.
      precision: as for `certify`.
      batch_size: noisy images at a time in votes and search. It can only decide near-ties, which may change a search.
      indices: as for `certify`.
      devices: as for `certify`.
      progress: whether to show progress bars on stderr.

    Returns:
      NumPy arrays, see `Attacks`.

    Raises:
      UserError: a `ValueError`, for settings or images outside their range, too few votes to prove anything, or a model
        that does not fit images and num_classes, or gives NaN.
    """
    alpha = probability("alpha", alpha)
    settings = {"sigma": sigma, "num_classes": num_classes, "n": n, "seed": seed, "batch_size": batch_size}
    settings |= {"sampler": sampler, "precision": precision, "progress": progress}
    task = prepare(apply_fn, images, indices, devices, **settings)
    check_attacks(task.settings.n, alpha=alpha, slack=task.settings.law.slack)
    effort = check_effort(copies=copies, steps=steps, restarts=restarts)
    asked = (lambda _, batch: apply_fn(batch), (), task.images, task.indices)
    about = {"settings": task.settings, "devices": task.devices, "alpha": alpha, "effort": effort}
    none = _none(task.images[:0] if sampler == GRID else to_float(task.images[:0]), task.settings.num_classes)
    return join(none, attack_images(*asked, **about), "attacking", len(task.images), progress)


def attack_images(
    apply_fn: ApplyFn,
    variables: Any,
    images: np.ndarray,
    indices: np.ndarray,
    *,
    settings: VoteSettings,
    alpha: float,
    effort: Effort,
    devices: Sequence[jax.Device],
) -> Iterator[Attacks]:
    """Yield attacks on the images, group after group, in order; see `attack`.

    The votes of a test are `settings.n`. The other arguments are as for `votes.count_votes`.

    Raises:
      UserError: as `count_votes`.
    """
    if settings.sampler != GRID:
        images = to_float(images)
    jobs = jobs_per_device(settings, effort, devices)
    voter = settings.voter(apply_fn, devices[0].platform)
    voter.check(variables, settings.image_shape, jobs * effort.copies, devices)  # a step of the search may be larger
    step, program = compile_step(apply_fn, settings, effort, devices), vote_program(apply_fn, settings, devices)
    group = _GROUPS * jobs * len(devices)
    for first in range(0, len(images), group):
        part = Task(images[first : first + group], indices[first : first + group], list(devices), settings)
        yield _attack(apply_fn, variables, part, step, program, alpha=alpha, effort=effort)


def _attack(
    apply_fn: ApplyFn,
    variables: Any,
    task: Task,
    step: Callable[..., jax.Array],
    program: VoteProgram,
    *,
    alpha: float,
    effort: Effort,
) -> Attacks:
    """Return attacks on the images of a task, by a step of `compile_step` and the votes of a program."""
    level = alpha / ATTACK_TESTS
    settings, images, indices = task.settings, task.images, task.indices

    def votes(images: np.ndarray, indices: np.ndarray, occasion: int, n: int = settings.n) -> np.ndarray:
        asked = {"settings": settings._replace(n=n), "devices": task.devices}
        about = {"stream": noise.Stream.ATTACK, "occasion": (occasion,), "program": program}
        groups = count_votes(apply_fn, variables, images, indices, **asked, **about)
        return np.concatenate([group.counts for group in groups])

    def test(images: np.ndarray, indices: np.ndarray, occasion: int) -> Prediction:
        counts = votes(images, indices, occasion)
        return conclude_prediction(counts, alpha=level, slack=settings.law.slack)

    result = _none(images, settings.num_classes)
    prediction = test(images, indices, Occasion.PREDICTION).prediction
    result.prediction[:] = prediction
    left = np.flatnonzero(prediction != ABSTAIN) if settings.num_classes > 1 else np.zeros(0, np.int64)
    if not len(left):
        return result
    attacked = task._replace(images=images[left], indices=indices[left])
    offsets, norms = search(step, variables, attacked, prediction[left], effort)
    found = np.isfinite(norms)  # else every step led out of the box
    left, offsets, norms = left[found], offsets[found], norms[found]
    if not len(left):
        return result

    # Votes at several norms, which need no proof: they choose the norm. Each has noise of its own, so errors average.
    span = settings.sigma * np.linspace(-_SPAN, _SPAN, _SCALES)[:, None] + norms
    tried = np.maximum(span, norms * np.linspace(0.2, 1, _SCALES)[:, None])  # [S, B]
    at_norms = np.stack([_moved(images[left], offsets, each) for each in tried])
    numbers = (indices[left] * _SCALES + np.arange(_SCALES)[:, None]) % (MAX_INDEX + 1)
    about = (at_norms.reshape(-1, *settings.image_shape), numbers.ravel())
    counts = votes(*about, Occasion.REFINEMENT, n=-(-settings.n // _SCALES)).reshape(_SCALES, len(left), -1)
    norms = _norms_to_prove(tried, counts, prediction[left], settings, level)

    for number in range(ATTACK_TESTS - 1):
        if not len(left):
            break
        candidates = _moved(images[left], offsets, norms)
        tested = test(candidates, indices[left], Occasion.PROOF + number)
        proven = (tested.prediction != ABSTAIN) & (tested.prediction != prediction[left])
        result.p_value[left], result.counts[left] = tested.p_value, tested.counts
        at = left[proven]
        result.adversarial[at], result.images[at] = tested.prediction[proven], candidates[proven]
        result.distance[at] = _distances(images[at], candidates[proven])
        margin, _, needed = _margins(tested.counts, prediction[left], settings.n, level)
        # The margin grows by at most 1 / sigma with the norm, and by less where the direction is not the best.
        norms = np.maximum(norms + 1.5 * settings.sigma * (needed - margin), 1.01 * norms)
        left, offsets, norms = left[~proven], offsets[~proven], norms[~proven]
    return result


def _none(images: np.ndarray, num_classes: int) -> Attacks:
    """Return the attacks on images that were not attacked."""
    number = len(images)
    nowhere, counts = np.full(number, np.inf), np.zeros((number, num_classes), np.int64)
    return Attacks(np.full(number, ABSTAIN), np.full(number, ABSTAIN), nowhere, images.copy(), np.ones(number), counts)


def _moved(images: np.ndarray, offsets: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Return images `[B, H, W, C]` moved along the offsets by norms `[B]`: uint8 of whole levels where they were."""
    levels = 255 if images.dtype == np.uint8 else 1
    moved = images + levels * (norms / norms_of(offsets))[:, None, None, None] * offsets
    if levels > 1:
        moved = np.rint(moved)
    return np.clip(moved, 0, levels).astype(images.dtype)


def _distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return l2 distances `[B]` in units where a pixel is in [0, 1], rounded up."""
    levels = 255 if images.dtype == np.uint8 else 1
    distance = norms_of(images.astype(np.float64) - others) / levels
    return distance * (1 + (math.prod(images.shape[1:]) + 4) * 2.0**-52)  # more than all rounding errors


def _margins(
    counts: np.ndarray, classes: np.ndarray, n: int, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return margins of counts `[..., B, K]`, their variances, and the margins with which n votes prove a class.

    A margin is Phi^-1 of the best other class's share of the votes for it and for the class `[B]`. With the last margin
    the test succeeds most of the time.
    """
    own = np.arange(counts.shape[-1]) == classes[:, None]
    of_own, of_other = np.where(own, counts, 0).sum(axis=-1), np.where(own, 0, counts).max(axis=-1)
    both = of_own + of_other + 1
    share = (of_other + 0.5) / both
    margin = special.ndtri(share)
    variance = 2 * np.pi * np.exp(np.square(margin)) * share * (1 - share) / both
    deviations = (_SPARE - special.ndtri(level / 2)) / np.sqrt(n * both / (counts.sum(axis=-1) + 1))
    return margin, variance, special.ndtri(0.5 + np.minimum(deviations / 2, 0.499))


def _norms_to_prove(
    norms: np.ndarray, counts: np.ndarray, classes: np.ndarray, settings: VoteSettings, level: float
) -> np.ndarray:
    """Return norms `[B]` at which n votes prove another class, from counts `[S, B, K]` at norms `[S, B]`.

    Margins grow along lines, fitted by least squares.
    """
    margin, variance, needed = _margins(counts, classes, settings.n, level)
    weight = 1 / variance
    weight /= weight.sum(axis=0)
    norm, height, target = ((weight * each).sum(axis=0) for each in (norms, margin, needed))
    spread = np.maximum((weight * np.square(norms - norm)).sum(axis=0), np.finfo(np.float64).tiny)
    slope = (weight * (norms - norm) * (margin - height)).sum(axis=0) / spread
    slope = np.clip(slope, 0.2 / settings.sigma, 1 / settings.sigma)  # it cannot be larger
    return np.maximum(norm + (target - height) / slope, norms[0])
