"""The measures of a certificate file: ACR, accuracies, abstention, votes and their cost.

Source of the measures: Cohen, Rosenfeld, Kolter (ICML 2019); Zhai et al. (ICLR 2020) for ACR. Why ACR alone misleads:
Sun et al. (ICML 2025).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.certificates.columns import CERTIFY, format_radius
from rs_consistency.certificates.proof import Evidence, uniform_draws
from rs_consistency.certificates.read import Certificates
from rs_consistency.statistics.bounds import ABSTAIN, ALPHA_SHARE, Certified, certify_votes, radius_ceiling

DEFAULT_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_FEWER = 10  # votes for each vote in `acr_at_tenth`
_MOST_DRAWN = 10**9 - 1  # votes for a class that NumPy draws from
_RECOMPUTED = 20_000  # lines in `acr_at_tenth`: chance moves the mean by about 1e-4 of itself


def acr(table: Certificates) -> float:
    """Return the average certified radius: the mean of radius times correct; abstentions and errors count 0."""
    return float(np.mean(table.radius * table.correct))


def certified_accuracy(table: Certificates, radius: float) -> float:
    """Return the share of images predicted correctly with a certified radius of at least `radius`."""
    return float(np.mean((table.radius >= radius) & (table.correct == 1)))


def summarize(
    paths: Sequence[Path],
    loaded: Sequence[tuple[Certificates, Evidence | None]],
    records: Sequence[Mapping[str, Any]],
    radii: Sequence[float] = DEFAULT_RADII,
) -> list[dict[str, Any]]:
    """Return the measures of files, as `analyze.py --format=json` prints them.

    | key | meaning |
    |---|---|
    | `path` | as the user named it |
    | `mode` | certify, decide, predict or attack |
    | `n_images` | |
    | `acr` | see `acr` |
    | `accuracy` | share of right classes, at any radius; of decisions, at their one radius |
    | `abstention` | share of images |
    | `radius` | of decisions |
    | `seconds` | sum over the images whose time is known |
    | `certified_accuracy` | a map from radius (as text, such as "0.25") to share |
    | `best` | a map from radius to whether no other file has a larger share; see `best_at` |
    | `sigma`, `n`, `alpha`, `bound` | as in `record.Settings` |
    | `radius_ceiling` | the largest radius that the most votes on an image can certify |
    | `at_ceiling` | share of images with all votes for the true class |
    | `hard` | share of images with less than half of the votes for the true class |
    | `base_accuracy` | mean share of votes for the true class: accuracy of the base classifier under noise |
    | `acr_two_class` | see `acr_two_class` |
    | `acr_at_tenth` | see `acr_at_tenth` |
    | `votes` | all votes, of selection and measurement |
    | `p_true` | a map from quantile (as text, such as "0.05") to the share of votes for the true class |

    None stands for whatever is not known, such as everything from `sigma` on without evidence. Only certificates have
    an ACR and certified accuracies. Files of earlier versions may not hold the votes for the true class of an image,
    see `votes_for_label`: then `base_accuracy` is None, `at_ceiling` and the quantiles are upper bounds, and `hard` is
    a lower bound.

    Args:
      paths: of the files.
      loaded: from `proof.load`.
      records: from `record.content_beside`; empty for a file without.
      radii: of the certified accuracies.
    """
    tables = [table for table, _ in loaded]
    best = best_at(tables, radii, [record.get("data_digest") for record in records])
    return [
        {
            "path": str(path),
            **_of_lines(table, radii),
            "radius": record.get("radius"),
            "best": is_best,
            **_of_votes(evidence),
        }
        for path, (table, evidence), record, is_best in zip(paths, loaded, records, best, strict=True)
    ]


def votes_for_label(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return the votes for the true class `[N]`, and whether they are known, bool `[N]`.

    A file of an earlier version holds those for the selected class, and the most for another class. The latter stands
    for the votes for the true class, which are at most as many, where another class was selected.
    """
    if all("count_label" in row for row in evidence.rows):
        return _column(evidence, "count_label"), np.ones(len(evidence.rows), bool)
    known = _column(evidence, "selected") == _column(evidence, "label")
    return np.where(known, evidence.count, _column(evidence, "count_runner_up")), known


def lower_of_label(evidence: Evidence) -> np.ndarray:
    """Return the lower confidence bounds `[N]` of the probability of the true class, at the alpha of the file.

    Where the true class was selected, it is `Evidence.lower`. Where its votes are not known, see `votes_for_label`, it
    is at most the returned one.

    Guarantee: for each image, the bound exceeds the probability of the true class under noise with probability at most
    alpha, since the label was not chosen by these votes.
    """
    return _conclude(evidence, votes_for_label(evidence)[0], evidence.votes).lower


def ceiling(evidence: Evidence) -> float:
    """Return the largest radius that the votes of a file can certify: the most votes on an image, all for one class."""
    settings = evidence.settings
    about = {"alpha": settings.alpha, "bound": settings.bound, "alpha_share": settings.alpha_share}
    return float(radius_ceiling(evidence.votes.max(), **about, **settings.law._asdict()))


def acr_two_class(evidence: Evidence) -> float | None:
    """Return the ACR that the same votes prove with the bound `two_class`; None if their own is not `clopper_pearson`.

    Guarantee: that of `bounds.certify_votes` at the file's alpha, for an author who quotes this ACR whatever the other
    one is. The radii of both bounds are not valid at once at this alpha.
    """
    if evidence.settings.bound != "clopper_pearson":
        return None
    runner_up = _column(evidence, "count_runner_up")
    proven = _conclude(evidence, evidence.count, evidence.votes, runner_up, bound="two_class", alpha_share=ALPHA_SHARE)
    written = np.array([float(format_radius(radius)) for radius in proven.radius])
    return float(np.mean(written * _is_right(evidence)))


def acr_at_tenth(evidence: Evidence) -> float | None:
    """Return the ACR to expect of a tenth of the votes on each image, with the file's bound and alpha.

    A tenth of an image's votes, drawn without replacement, holds a hypergeometric number of votes for the selected
    class. The mean is over such draws, always the same. The bound `two_class` depends on the most votes for another
    class as well, which the counts do not tell of a part of the votes: None. So is it for more votes than NumPy draws
    from.
    """
    if evidence.settings.bound == "two_class" or evidence.votes.max() > _MOST_DRAWN:
        return None
    fewer, right = np.maximum(evidence.votes // _FEWER, 1), _is_right(evidence)
    shape = -(-_RECOMPUTED // len(right)), len(right)
    drawn = np.random.default_rng(0).hypergeometric(evidence.count, evidence.votes - evidence.count, fewer, shape)
    return float(np.mean(_conclude(evidence, drawn, fewer).radius * right))


def best_at(
    tables: Sequence[Certificates], radii: Sequence[float], digests: Sequence[str | None]
) -> list[dict[str, bool | None]]:
    """Return for each file a map from radius (as text) to whether no other file has a larger certified accuracy.

    Where all have 0, none is the best. All are None unless there are several files of certificates, and all of them are
    of the same images. `digests` are those of the images' content, None for a file that does not tell.
    """
    certified = [place for place, table in enumerate(tables) if table.mode == CERTIFY.name]
    images = [np.stack([table.idx, table.label])[:, np.argsort(table.idx)] for table in (tables[i] for i in certified)]
    known = {digests[place] for place in certified} - {None}
    comparable = len(certified) > 1 and len(known) < 2 and all(np.array_equal(images[0], each) for each in images)
    found: list[dict[str, bool | None]] = [{} for _ in tables]
    for radius in radii:
        shares = {place: certified_accuracy(tables[place], radius) for place in certified} if comparable else {}
        for place, of_file in enumerate(found):
            of_file[_text(radius)] = shares[place] == max(shares.values()) > 0 if place in shares else None
    return found


def _of_lines(table: Certificates, radii: Sequence[float]) -> dict[str, Any]:
    """Return the measures of the lines of a file."""
    certifies, known = table.mode == CERTIFY.name, np.isfinite(table.seconds)
    shares = [certified_accuracy(table, radius) if certifies else None for radius in radii]
    return {
        "mode": table.mode,
        "n_images": len(table.idx),
        "acr": acr(table) if certifies else None,
        "accuracy": certified_accuracy(table, 0.0),
        "abstention": float(np.mean(table.predict == ABSTAIN)),
        "seconds": float(table.seconds[known].sum()) if known.any() else None,
        "certified_accuracy": dict(zip(map(_text, radii), shares, strict=True)),
    }


def _of_votes(evidence: Evidence | None) -> dict[str, Any]:
    """Return the measures of the votes of a file."""
    names = ("sigma", "n", "alpha", "bound")
    if evidence is None:
        others = ("radius_ceiling", "at_ceiling", "hard", "base_accuracy", "acr_two_class", "acr_at_tenth", "votes")
        return {**dict.fromkeys((*names, *others)), "p_true": dict.fromkeys(map(_text, QUANTILES))}
    votes, known = votes_for_label(evidence)
    shares = votes / evidence.votes
    # A value that occurs: between two of them, interpolation would invent one.
    quantiles = np.quantile(shares, QUANTILES, method="inverted_cdf").tolist()
    return {
        **{name: getattr(evidence.settings, name) for name in names},
        "radius_ceiling": ceiling(evidence),
        "at_ceiling": float(np.mean(votes == evidence.votes)),
        "hard": float(np.mean(2 * votes < evidence.votes)),
        "base_accuracy": float(np.mean(shares)) if known.all() else None,
        "acr_two_class": acr_two_class(evidence),
        "acr_at_tenth": acr_at_tenth(evidence),
        "votes": int(evidence.settings.n0 * len(evidence.rows) + evidence.votes.sum()),
        "p_true": dict(zip(map(_text, QUANTILES), quantiles, strict=True)),
    }


def _text(number: float) -> str:
    return f"{number:.10g}"


def _conclude(
    evidence: Evidence, count: ArrayLike, votes: ArrayLike, runner_up: ArrayLike = 0, **changes: Any
) -> Certified:
    """Return the certificates of counts, with the file's settings but for the changes."""
    settings = evidence.settings._replace(**changes)
    return certify_votes(
        count,
        runner_up,
        votes,
        alpha=settings.alpha,
        bound=settings.bound,
        alpha_share=settings.alpha_share,
        uniform=uniform_draws(settings, _column(evidence, "idx")),
        **settings.law._asdict(),
    )


def _is_right(evidence: Evidence) -> np.ndarray:
    return _column(evidence, "selected") == _column(evidence, "label")


def _column(evidence: Evidence, name: str) -> np.ndarray:
    return np.array([row[name] for row in evidence.rows])
