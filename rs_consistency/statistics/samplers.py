"""The samplers of noise, and the numbers that bounds take from them.

| sampler | noise | guarantee |
|---|---|---|
| grid | rounded to whole steps of 1/255, added in whole numbers | within `slack` of the theorem's noise |
| float | float32 numbers, added in float32 | only as far as their rounding is taken as none |

`grid` needs images of 8 bits. `float` is the usual way, for comparisons with published files, and for other images.
"""

from typing import Any, NamedTuple

import numpy as np

from rs_consistency.common.checks import number_above, one_of, whole_number
from rs_consistency.statistics.rounded_gaussian import STEPS, sampler_error

GRID, FLOAT = SAMPLERS = ("grid", "float")


class NoiseLaw(NamedTuple):
    """The law of the noise, as bounds and tests take it.

    Attributes:
      sigma: standard deviation of the Gaussian noise that the certificate is about, float64.
      slack: largest difference that the sampler makes to the probability of a class in one vote.
    """

    sigma: float
    slack: float


def noise_law(sampler: Any, *, sigma: float, dimension: int, steps: int = STEPS) -> NoiseLaw:
    """Return the law of a sampler's noise in an image of `dimension` pixel values.

    Raises:
      UserError: for an unknown sampler, or a sigma that the grid cannot have; see `rounded_gaussian.grid_table`.

    Example:
      >>> from rs_consistency.statistics.samplers import noise_law
      >>> law = noise_law("grid", sigma=0.12, dimension=28 * 28)
      >>> law.sigma, float(f"{law.slack:.1e}")
      (0.12, 2.9e-14)
      >>> noise_law("float", sigma=0.12, dimension=28 * 28)
      NoiseLaw(sigma=0.11999999731779099, slack=0.0)
    """
    one_of("sampler", sampler, SAMPLERS)
    sigma = number_above("sigma", sigma, 0)
    for name, value in (("dimension", dimension), ("steps", steps)):
        whole_number(name, value, at_least=1)
    if sampler == GRID:
        return NoiseLaw(sigma, sampler_error(sigma, dimension, steps))
    with np.errstate(over="ignore", under="ignore"):
        return NoiseLaw(min(sigma, float(np.float32(sigma))), 0.0)  # in float32 it may be a little smaller
