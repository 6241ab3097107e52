"""Statements about the certificates of many images together.

A certificate is wrong with probability at most alpha, so some of N may be wrong. The certified accuracy that is counted
from the file is therefore no guarantee. Two lower bounds are, at confidence 1 - delta. Write, for image i and radius r,

- Y_i(r) = 1 if the smoothed classifier gives the label everywhere within r of the image: the truth;
- Z_i(r) = 1 if the line of the file says so (correct, radius at least r): the observation;
- E_i = 1 if the line claims something that is not so.

A line that claims the truth and claims r makes Y_i(r) = 1; hence Y_i(r) >= Z_i(r) - E_i for every r, and P(E_i = 1) <=
alpha.

**These N images.** They are fixed; only the votes are random, and independent between images (unless two images share a
64-bit key: docs/certificate.md has the probability, which is to be added to delta). The number of wrong lines
is then stochastically at most Binomial(N, alpha), and exceeds b = `wrong_at_most` with probability at most delta.
Otherwise mean Y(r) >= mean Z(r) - b / N, for *all* r at once. N counts all images: how many lines claim anything
depends on the votes, and among images whose p_A is just below what can be certified, every line that claims something
is wrong.

**The population that the images are an independent sample of.** E[Y(r)] >= E[Z(r)] - alpha, and the Z_i(r) are
independent with the same mean, which Clopper-Pearson bounds from below. The statement is about one r that was not
chosen by looking; for R of them at once take delta / R.

Both take the images as chosen without looking at their votes, and alpha and bound too (see `proof.load`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from rs_consistency.certificates.read import Certificates
from rs_consistency.common.checks import count, probability
from rs_consistency.statistics.bounds import lower_confidence_bound

DEFAULT_DELTA = 0.001


def wrong_at_most(num_images: int, *, alpha: float, delta: float = DEFAULT_DELTA) -> int:
    """Return the smallest b with P(Binomial(num_images, alpha) > b) <= delta.

    Guarantee: of certificates that are wrong with probability at most alpha each, independently, more than b are wrong
    with probability at most delta.

    Args:
      num_images: N, abstentions included.
      alpha: error probability of one certificate.
      delta: error probability of the statement.

    Returns:
      0 to N; 0 if alpha was divided by N (Bonferroni) and delta is at least the alpha that was divided.

    Raises:
      UserError: for an argument outside its range.
    """
    num_images = count("num_images", num_images)
    alpha, delta = probability("alpha", alpha), probability("delta", delta)
    b = np.arange(num_images)
    few_enough = special.betainc(b + 1, num_images - b, alpha) <= delta  # the tail, without cancellation
    return int(np.argmax(few_enough)) if few_enough.any() else num_images


def certified_accuracy_lower(
    table: Certificates, radius: float, *, alpha: float, delta: float = DEFAULT_DELTA
) -> float:
    """Return a lower confidence bound of the true certified accuracy of these images, whose votes are independent.

    Guarantee: with probability at least 1 - delta over the votes, the share of these images around which the smoothed
    classifier gives the label within `radius` is not below the bound, for all radii at once. See the module's text.

    It is 0 to 1, at most the counted certified accuracy. Arguments and errors as for `wrong_at_most`.
    """
    sure = _observed(table, radius) - wrong_at_most(len(table.idx), alpha=alpha, delta=delta)
    return max(sure, 0) / len(table.idx)


def population_accuracy_lower(
    table: Certificates, radius: float, *, alpha: float, delta: float = DEFAULT_DELTA
) -> float:
    """Return a lower confidence bound of the certified accuracy in the population that the images were drawn from.

    Guarantee: with probability at least 1 - delta over images and votes, the probability that the smoothed classifier
    gives the label of a new image within `radius` of it is not below the bound, for one radius. See the module's text.

    It is 0 to 1. Arguments and errors as for `wrong_at_most`.
    """
    alpha, delta = probability("alpha", alpha), probability("delta", delta)
    observed = lower_confidence_bound(_observed(table, radius), len(table.idx), delta)
    return max(float(observed) - alpha, 0.0)


def joint_statement(
    table: Certificates, radii: Sequence[float], *, alpha: float, delta: float = DEFAULT_DELTA
) -> dict[str, Any]:
    """Return the joint statement about a file, as `analyze.py --joint --format=json` prints it.

    It holds `delta`, the error probability of each of the two statements by itself; `wrong_at_most`, the number of
    wrong certificates; `certified_accuracy_lower` and `population_accuracy_lower`, maps from radius (as text) to the
    bounds of the two functions above.
    """
    found: dict[str, Any] = {"delta": delta, "wrong_at_most": wrong_at_most(len(table.idx), alpha=alpha, delta=delta)}
    for bound in (certified_accuracy_lower, population_accuracy_lower):
        found[bound.__name__] = {f"{radius:.10g}": bound(table, radius, alpha=alpha, delta=delta) for radius in radii}
    return found


def _observed(table: Certificates, radius: float) -> int:
    """Return the number of lines that are correct with a radius of at least `radius`."""
    return int(np.sum((table.radius >= radius) & (table.correct == 1)))
