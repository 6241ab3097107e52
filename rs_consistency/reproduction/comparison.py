"""Measured beside published ACRs: means over seeds, standard errors, and differences in standard errors."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.certificates.measures import certified_accuracy
from rs_consistency.certificates.read import Certificates
from rs_consistency.reproduction.plan import is_about_images
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
    """One method at one sigma, over its seeds.

    Attributes:
      method: name of the method.
      sigma: standard deviation of the noise.
      lbd: weight of the consistency term in a table that compares weights; None in other tables.
      acr: mean over the seeds.
      deviation: standard deviation over the seeds; None for a single seed.
      interval: 95 % bootstrap interval of the ACR over images.
      accuracy: share of correctly classified images, mean over the seeds.
      published: published ACR; None where there is none for this model and dataset.
      difference: measured minus published.
      error: standard error of the difference, from `difference_error`; None where it is not known.
      seeds: number of seeds.
      images: number of images certified for each seed.
      epochs: number of epochs trained.
      notes: deviations from the published settings, a phrase each.
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
    """Two methods on the same images, over the seeds that both have with the same settings: method minus baseline.

    Attributes:
      sigma: standard deviation of the noise.
      method: name of a method.
      baseline: name of the other method.
      seeds: number of seeds.
      difference: over the images that all runs have.
      notes: deviations of either method's runs from the published settings, a phrase each.
    """

    sigma: float
    method: str
    baseline: str
    seeds: int
    difference: PairedDifference
    notes: tuple[str, ...] = ()


def groups_of(results: Sequence[Result]) -> list[list[Result]]:
    """Return groups of runs that differ only in the seed, ordered by sigma, method and weight.

    Runs with different settings (epochs, images, votes, any deviation) are in different groups, and so are runs on
    images of different content.
    """

    def kind(one: Result) -> tuple:
        images = tuple(np.sort(one.certificates.idx).tolist())
        others = tuple(text for text in one.deviations if not is_about_images(text))
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
    published = published_acr(
        table,
        method=first.method,
        sigma=first.sigma,
        lbd=first.lbd,
        dataset=changed.get("dataset.name"),
        model=changed.get("model"),
    )
    error = None
    if published is not None and len(per_image) > 1:
        error = difference_error(per_image, deviation, len(group), published, table)
    return Row(
        method=first.method,
        sigma=first.sigma,
        lbd=first.lbd,
        acr=acr,
        deviation=deviation,
        interval=bootstrap_interval(per_image) if len(per_image) > 1 else Interval(acr, acr),
        accuracy=float(np.mean([certified_accuracy(one.certificates, 0.0) for one in group])),
        published=published,
        difference=None if published is None else acr - published.acr,
        error=error,
        seeds=len(group),
        images=radii.shape[1],
        epochs=first.epochs,
        notes=first.deviations,
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

    Args:
      per_image: `[N]`, radius times correct, averaged over the measured seeds.
      deviation: over the measured seeds; None for a single seed.
      seeds: number of measured seeds.
      published: published ACR.
      table: of the published ACR.

    Returns:
      None when no deviation over seeds is known: an error from the images alone would be too small.
    """
    known = [(seeds - 1, deviation), (published.seeds - 1, published.deviation)]
    squares = [(freedom, s**2) for freedom, s in known if s is not None and freedom]
    if not squares:
        return None
    pooled = sum(freedom * square for freedom, square in squares) / sum(freedom for freedom, _ in squares)
    images = 0.0
    if not table.same_images:
        images = standard_error(per_image) * math.sqrt(1 + len(per_image) / table.images)
    elif len(per_image) < table.images:
        images = standard_error(per_image, population=table.images)
    return math.sqrt(pooled * (1 / seeds + 1 / published.seeds) + images**2)


def pairs_of(results: Sequence[Result], baselines: Sequence[str] = ("gaussian", "smoothadv")) -> list[Pair]:
    """Compare every method with Gaussian, and a method with the consistency term with the method without it.

    Only runs of the same settings are compared. The numbers of images may differ: the common images are compared.
    """
    found = []
    for sigma, group in itertools.groupby(sorted(results, key=lambda one: one.sigma), key=lambda one: one.sigma):
        kinds: dict[Any, dict[str, dict[int, Result]]] = {}  # settings -> method -> seed -> run
        for one in group:
            if one.lbd is None:
                kinds.setdefault(_settings(one), {}).setdefault(one.method, {})[one.seed] = one
        for baseline, method in itertools.product(
            baselines, sorted({name for runs in kinds.values() for name in runs})
        ):
            if method == baseline or (baseline != "gaussian" and method != f"{baseline}+consistency"):
                continue
            for runs in kinds.values():
                ours, theirs = runs.get(method, {}), runs.get(baseline, {})
                found += _pair(sigma, method, baseline, [(ours[seed], theirs[seed]) for seed in ours if seed in theirs])
    return found


def _settings(one: Result) -> tuple[int, tuple[str, ...], str | None]:
    """Return the settings that two methods must have in common to be compared.

    Warm-ups, which not all methods have, follow the epochs and are left out. The dataset's content is part of the
    settings, since images are identified by their numbers.
    """
    texts = [text for text in one.deviations if not is_about_images(text)]
    if any(text.startswith("num_epochs ") for text in texts):
        texts = [text for text in texts if not text.partition(" ")[0].endswith(".warmup_epochs")]
    return one.epochs, tuple(texts), one.data_digest


def _pair(sigma: float, method: str, baseline: str, runs: list[tuple[Result, Result]]) -> list[Pair]:
    """Return the comparison over seeds, image by image; no comparison for fewer than two common images."""
    if not runs:
        return []
    common = sorted(set.intersection(*(set(one.certificates.idx.tolist()) for pair in runs for one in pair)))
    if len(common) < 2:
        return []
    ours, theirs = (np.mean([_radii(pair[side].certificates, common) for pair in runs], axis=0) for side in (0, 1))
    notes = tuple(dict.fromkeys(text for pair in runs for one in pair for text in one.deviations))
    return [Pair(sigma, method, baseline, len(runs), paired_difference(ours, theirs), notes)]


def _radii(table: Certificates, images: Sequence[int] | None = None) -> np.ndarray:
    """Return radius times correct, by ascending image number."""
    order = np.argsort(table.idx)
    values = (table.radius * table.correct)[order]
    return values if images is None else values[np.isin(table.idx[order], images)]


def together(results: Sequence[Result]) -> Certificates:
    """Return the lines of a group of `groups_of` as one table, whose curve is the mean over the seeds."""
    tables = [one.certificates for one in results]
    return Certificates(*(np.concatenate([getattr(table, name) for table in tables]) for name in Certificates._fields))
