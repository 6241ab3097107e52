"""Measured beside published ACRs: means over seeds, standard errors, and differences in standard errors."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.certificates.measures import certified_accuracy
from rs_consistency.certificates.read import Certificates
from rs_consistency.reproduction.plan import follows_epochs, without_images
from rs_consistency.reproduction.published import Published, Table, published_acr
from rs_consistency.reproduction.results import Result
from rs_consistency.statistics.intervals import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference,
    standard_error,
)


class Row(NamedTuple):
    """A method at a sigma over its seeds, whose settings are those of the `first` run.

    Attributes:
      acr, accuracy: means over the seeds.
      deviation: standard deviation of the ACR over the seeds; None for a single seed.
      interval: 95 % bootstrap interval of the ACR over images.
      published: None where nothing is published for this model and dataset.
      error: standard error of the difference, from `difference_error`; None where it is not known.
    """

    first: Result
    seeds: int
    images: int
    acr: float
    accuracy: float
    deviation: float | None
    interval: Interval
    published: Published | None
    error: float | None

    @property
    def difference(self) -> float | None:
        """Measured minus published ACR."""
        return None if self.published is None else self.acr - self.published.acr

    @property
    def errors_apart(self) -> float | None:
        """The difference in standard errors."""
        return self.difference / self.error if self.error else None


class Pair(NamedTuple):
    """Two methods on the images that all runs have, over their common seeds with the same settings.

    The difference is `method` minus `baseline`. The notes are the deviations of all runs from the published settings.
    """

    sigma: float
    method: str
    baseline: str
    seeds: int
    difference: PairedDifference
    notes: tuple[str, ...]


def groups_of(results: Sequence[Result]) -> list[list[Result]]:
    """Return groups of runs that differ only in the seed, ordered by sigma, method and weight.

    Runs with different settings (epochs, images, votes, any deviation) are in different groups, and so are runs on
    images of different content.
    """

    def kind(one: Result) -> tuple:
        images = np.sort(one.certificates.idx).tolist()
        others = without_images(one.deviations)
        return one.sigma, one.method, one.lbd or 0, one.epochs, others, images, one.data_digest or ""

    return [list(group) for _, group in itertools.groupby(sorted(results, key=kind), key=kind)]


def rows_of(results: Sequence[Result], table: Table) -> list[Row]:
    """Return a row for each of `groups_of`: the mean over its seeds, beside the published ACR."""
    return [_row(group, table) for group in groups_of(results)]


def _row(group: Sequence[Result], table: Table) -> Row:
    first, radii = group[0], np.stack([_radii(one.certificates) for one in group])
    acr, per_image = float(radii.mean()), radii.mean(axis=0)
    deviation = float(radii.mean(axis=1).std(ddof=1)) if len(group) > 1 else None
    changed = dict(phrase.partition(" ")[::2] for phrase in first.deviations)
    published = published_acr(table, first.method, first.sigma, first.lbd, changed)
    known = published is not None and len(per_image) > 1
    return Row(
        first=first,
        seeds=len(group),
        images=len(per_image),
        acr=acr,
        accuracy=float(np.mean([certified_accuracy(one.certificates, 0.0) for one in group])),
        deviation=deviation,
        interval=bootstrap_interval(per_image) if len(per_image) > 1 else Interval(acr, acr),
        published=published,
        error=difference_error(per_image, deviation, len(group), published, table) if known else None,
    )


def difference_error(
    per_image: np.ndarray, deviation: float | None, seeds: int, published: Published, table: Table
) -> float | None:
    """Return the standard error of a measured ACR minus the published ACR of the same method, from other seeds.

    With k measured seeds of standard deviation s_1, and K published seeds of s_2, the variance is s^2 (1/k + 1/K).
    Both are estimates of the same deviation, so they are pooled: s^2 = ((k - 1) s_1^2 + (K - 1) s_2^2) / (k + K - 2).
    A deviation that is not known, such as that of a single seed, is left out. The variance of the test images is added.
    It is that of a sample of the published images, 0 for all of them. Where measured and published images are two
    samples (`Table.same_images` is False), it is that of both, at the measured images' standard deviation.

    The result is None when no deviation over seeds is known: an error from the images alone would be too small.
    `per_image` `[N]` is radius times correct, averaged over the measured seeds.
    """
    known = [(seeds - 1, deviation), (published.seeds - 1, published.deviation)]
    squares = [(freedom, s**2) for freedom, s in known if s is not None and freedom]
    if not squares:
        return None
    pooled = sum(freedom * square for freedom, square in squares) / sum(freedom for freedom, _ in squares)
    images, others = 0.0, published.images or table.images
    if not table.same_images:
        images = standard_error(per_image) * math.sqrt(1 + len(per_image) / others)
    elif len(per_image) < others:
        images = standard_error(per_image, population=others)
    return math.sqrt(pooled * (1 / seeds + 1 / published.seeds) + images**2)


def pairs_of(results: Sequence[Result]) -> list[Pair]:
    """Compare every method with Gaussian, and a method with the consistency term with the method without it.

    Only runs of the same settings are compared. The numbers of images may differ: the common images are compared.
    """
    kinds: dict[Any, dict[str, dict[int, Result]]] = {}  # sigma and settings -> method -> seed -> run
    for one in results:
        if one.lbd is None:
            kinds.setdefault((one.sigma, _settings(one)), {}).setdefault(one.method, {})[one.seed] = one
    found = []
    for runs in kinds.values():
        for method, baseline in itertools.permutations(runs, 2):
            if baseline == "gaussian" or method == f"{baseline}+consistency":
                seeds = [seed for seed in runs[method] if seed in runs[baseline]]
                found += _pair([(runs[method][seed], runs[baseline][seed]) for seed in seeds])
    return sorted(found, key=lambda pair: (pair.sigma, pair.baseline, pair.method))


def _settings(one: Result) -> tuple[tuple[str, ...], str | None]:
    """Return the settings that two methods must have in common to be compared.

    Published schedules may differ between methods. Keys that not all methods have, and that follow other numbers of
    epochs, such as warm-ups, are left out. The dataset's content is part of the settings, since images are identified
    by their numbers.
    """
    texts = without_images(one.deviations)
    if any(text.startswith("num_epochs ") for text in texts):
        texts = [text for text in texts if not follows_epochs(text)]
    return tuple(texts), one.data_digest


def _pair(runs: Sequence[tuple[Result, Result]]) -> list[Pair]:
    """Return the comparison over seeds, image by image; none without a seed or two common images."""
    images = [set(one.certificates.idx.tolist()) for both in runs for one in both]
    common = sorted(set.intersection(*images)) if runs else []
    if len(common) < 2:
        return []
    ours, theirs = (
        np.mean([_radii(one.certificates, common) for one in side], axis=0) for side in zip(*runs, strict=True)
    )
    notes = tuple(dict.fromkeys(text for both in runs for one in both for text in one.deviations))
    first, other = runs[0]
    return [Pair(first.sigma, first.method, other.method, len(runs), paired_difference(ours, theirs), notes)]


def _radii(table: Certificates, images: Sequence[int] | None = None) -> np.ndarray:
    """Return radius times correct, by ascending image number."""
    order = np.argsort(table.idx)
    values = (table.radius * table.correct)[order]
    return values if images is None else values[np.isin(table.idx[order], images)]
