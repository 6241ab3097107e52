"""The measures of a certificate file: ACR, accuracies, abstention, votes.

Source of the measures: Cohen, Rosenfeld, Kolter (ICML 2019); Zhai et al. (ICLR 2020) for ACR.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rs_consistency.certificates.proof import Evidence
from rs_consistency.certificates.read import Certificates
from rs_consistency.statistics.bounds import ABSTAIN, radius_ceiling

DEFAULT_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
P_A_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def acr(table: Certificates) -> float:
    """Return the average certified radius: the mean of radius times correct; abstentions and errors count 0."""
    return float(np.mean(table.radius * table.correct))


def certified_accuracy(table: Certificates, radius: float) -> float:
    """Return the share of images predicted correctly with a certified radius of at least `radius`."""
    return float(np.mean((table.radius >= radius) & (table.correct == 1)))


def summarize(path: Path, table: Certificates, radii: Sequence[float] = DEFAULT_RADII) -> dict[str, Any]:
    """Return the measures of one file, as `analyze.py --format=json` prints them.

    They are `path`, as the user named it; `n_images`; `acr`; `accuracy` (correct, at any radius); `abstention` (share);
    `certified_accuracy`, a map from radius (as text, such as "0.25") to share.
    """
    return {
        "path": str(path),
        "n_images": len(table.idx),
        "acr": acr(table),
        "accuracy": certified_accuracy(table, 0.0),
        "abstention": float(np.mean(table.predict == ABSTAIN)),
        "certified_accuracy": {f"{radius:.10g}": certified_accuracy(table, radius) for radius in radii},
    }


def summarize_votes(evidence: Evidence | None) -> dict[str, Any]:
    """Return the measures of a file's votes, as `analyze.py --format=json` prints them beside those of `summarize`.

    They are `sigma`, `n`, `alpha` and `bound`, as in `record.Settings`; `radius_ceiling`, the largest radius that n
    votes can certify; `at_ceiling`, the share of images with all n votes for the selected class; `p_a`, a map from
    quantile (as text, such as "0.05") to the estimate count / n that this share of the images does not exceed. All are
    None without evidence.
    """
    names = ("sigma", "n", "alpha", "bound")
    if evidence is None:
        found = dict.fromkeys((*names, "radius_ceiling", "at_ceiling"))
        return found | {"p_a": {f"{share:g}": None for share in P_A_QUANTILES}}
    settings = {name: getattr(evidence.settings, name) for name in names}
    # A value that occurs: between two of them, interpolation would invent one.
    quantiles = np.quantile(evidence.count / settings["n"], P_A_QUANTILES, method="inverted_cdf")
    return {
        **settings,
        "radius_ceiling": float(radius_ceiling(**settings | evidence.settings.law._asdict())),
        "at_ceiling": float(np.mean(evidence.count == settings["n"])),
        "p_a": {f"{share:g}": float(value) for share, value in zip(P_A_QUANTILES, quantiles, strict=True)},
    }
