"""Measured beside published: means over seeds, errors, and differences in units of them."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rs_consistency.analysis import Certificates, certified_accuracy
from rs_consistency.reproduction.published import TRADEOFF, Published, Table
from rs_consistency.reproduction.results import Result
from rs_consistency.statistics import Interval, PairedDifference, bootstrap_interval, paired_difference, standard_error


class Row(NamedTuple):
    """One method at one sigma, over its seeds.

    Attributes:
      method: its name.
      sigma: standard deviation of the noise.
      lbd: weight of the consistency term in a table that compares weights; else None.
      acr: mean over the seeds.
      deviation: standard deviation over the seeds; None for a single one.
      interval: 95 %, of the ACR over images of the kind, by the bootstrap over the images.
      accuracy: mean over the seeds of the share that is classified correctly.
      published: the published ACR; None where there is none.
      difference: measured minus published.
      error: standard error of that difference; see `difference_error`. None where it is not known.
      seeds: how many.
      images: certified for each.
      epochs: trained.
      notes: what is not as published, a phrase each.
    """

    method: str
    sigma: float
    lbd: float | None
    acr: float
    deviation: float | None
    interval: Interval
    accuracy: float
    published: Published | None
    difference: float | None
    error: float | None
    seeds: int
    images: int
    epochs: int
    notes: tuple[str, ...]

    @property
    def errors_apart(self) -> float | None:
        """The difference in standard errors."""
        return None if not self.error or self.difference is None else self.difference / self.error


class Pair(NamedTuple):
    """Two methods on the same images, over the seeds that both have: method minus baseline."""

    sigma: float
    method: str
    baseline: str
    seeds: int
    difference: PairedDifference


def rows_of(results: Sequence[Result], table: Table) -> list[Row]:
    """A row for each method, sigma and weight, in the order of the results.

    Runs with different settings (epochs, images, votes, anything that deviates) are different rows.
    """

    def kind(one: Result) -> tuple:
        images = tuple(np.sort(one.certificates.idx).tolist())
        return one.sigma, one.method, one.lbd or 0, one.epochs, one.deviations, images

    ordered = sorted(results, key=kind)
    return [_row(list(group), table) for _, group in itertools.groupby(ordered, key=kind)]


def _row(group: list[Result], table: Table) -> Row:
    first, radii = group[0], np.stack([_radii(one.certificates) for one in group])
    acr, per_image = float(radii.mean()), radii.mean(axis=0)
    deviation = float(radii.mean(axis=1).std(ddof=1)) if len(group) > 1 else None
    if first.lbd is None:
        published = table.cells.get((first.method, first.sigma))
    else:
        published = Published(TRADEOFF[first.lbd][0]) if first.lbd in TRADEOFF else None
    error = None
    if published is not None and len(per_image) > 1:
        error = difference_error(per_image, deviation, len(group), published, table.images)
    return Row(
        method=first.method, sigma=first.sigma, lbd=first.lbd, acr=acr, deviation=deviation,
        interval=bootstrap_interval(per_image) if len(per_image) > 1 else Interval(acr, acr),
        accuracy=float(np.mean([certified_accuracy(one.certificates, 0.0) for one in group])),
        published=published, difference=None if published is None else acr - published.acr, error=error,
        seeds=len(group), images=radii.shape[1], epochs=first.epochs, notes=first.deviations,
    )  # fmt: skip


def difference_error(
    per_image: np.ndarray, deviation: float | None, seeds: int, published: Published, published_images: int
) -> float | None:
    """Standard error of a measured ACR minus the published one of the same method.

    Three errors are added in squares: of ours over seeds, of theirs over seeds, and of the test images where ours are
    only some of theirs (0 where they are all of them). Training differs between seeds as much here as there: a single
    seed is given the published deviation, and a single published one ours.

    Args:
      per_image: `[N]`, radius times correct, averaged over our seeds.
      deviation: over our seeds; None for a single one.
      seeds: how many are ours.
      published: the other number.
      published_images: size of the test set that it is the mean of.

    Returns:
      None when neither deviation over seeds is known, unless images are what dominates: then these alone.
    """
    known = published.deviation if published.deviation is not None else deviation
    ours = deviation if deviation is not None else published.deviation
    images = 0.0
    if len(per_image) < published_images:
        images = standard_error(per_image, population=published_images)
    if known is None or ours is None:
        return images or None
    return math.sqrt(ours**2 / seeds + known**2 / published.seeds + images**2)


def pairs_of(results: Sequence[Result], baselines: Sequence[str] = ("gaussian", "smoothadv")) -> list[Pair]:
    """Every method against Gaussian, and those with the consistency term against the method without it."""
    found = []
    for sigma, group in itertools.groupby(sorted(results, key=lambda one: one.sigma), key=lambda one: one.sigma):
        runs = {(one.method, one.seed, one.epochs): one for one in group if one.lbd is None}
        methods = dict.fromkeys(method for method, _, _ in runs)
        for baseline, method in itertools.product(baselines, methods):
            if method == baseline or (baseline != "gaussian" and method != f"{baseline}+consistency"):
                continue
            shared = [key[1:] for key in runs if key[0] == method and (baseline, *key[1:]) in runs]
            found += _pair(sigma, method, baseline, [(runs[method, *key], runs[baseline, *key]) for key in shared])
    return found


def _pair(sigma: float, method: str, baseline: str, runs: list[tuple[Result, Result]]) -> list[Pair]:
    """The comparison over seeds, image by image; none where there are fewer than two common images."""
    if not runs:
        return []
    common = sorted(set.intersection(*(set(one.certificates.idx.tolist()) for pair in runs for one in pair)))
    if len(common) < 2:
        return []
    ours, theirs = (
        np.mean([_radii(pair[side].certificates, common) for pair in runs], axis=0) for side in (0, 1)
    )  # fmt: skip
    return [Pair(sigma, method, baseline, len(runs), paired_difference(ours, theirs))]


def _radii(table: Certificates, images: Sequence[int] | None = None) -> np.ndarray:
    """Radius times correct, by ascending image number."""
    order = np.argsort(table.idx)
    values = (table.radius * table.correct)[order]
    return values if images is None else values[np.isin(table.idx[order], images)]


def together(results: Sequence[Result]) -> Certificates:
    """The lines of several seeds as one table, whose curve is the mean of theirs."""
    tables = [one.certificates for one in results]
    return Certificates(
        *(np.concatenate([getattr(table, name) for table in tables]) for name in Certificates._fields[:-1])
    )
