"""Training methods by name.

A method turns a batch and its noise into named loss terms. A new one is a module of this package and a line in
`METHODS`; the trainer knows none of them by name. The consistency term is no method: it is added to every method
that hands back the logits of M noisy copies.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from rs_consistency import losses
from rs_consistency.errors import UserError
from rs_consistency.methods import gaussian
from rs_consistency.methods.base import MethodOutput, NoisyLogits

METHODS: dict[str, Callable[..., MethodOutput]] = {
    "gaussian": gaussian.terms,
}


class Objective(NamedTuple):
    """What `make_objective` returns for one batch.

    Attributes:
      loss: `[B]`, the sum of the terms.
      terms: name -> `[B]`.
    """

    loss: jax.Array
    terms: Mapping[str, jax.Array]


def make_objective(
    method: str, *, consistency_lbd: float, consistency_eta: float, consistency_form: str
) -> Callable[[NoisyLogits, jax.Array, jax.Array, jax.Array], Objective]:
    """Builds the per-example objective of a method, with the consistency term where its weight is positive.

    Args:
      method: a key of `METHODS`.
      consistency_lbd: weight of the consistency term; 0 leaves it out, entropy included.
      consistency_eta: weight of the entropy in it.
      consistency_form: one of `losses.FORMS`.

    Returns:
      `objective(noisy_logits, images [B, H, W, C], labels [B], noise [M, B, H, W, C])`.

    Raises:
      UserError: for an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown; use one of {', '.join(sorted(METHODS))}")
    method_terms = METHODS[method]

    def objective(noisy_logits: NoisyLogits, images: jax.Array, labels: jax.Array, noise: jax.Array) -> Objective:
        output = method_terms(noisy_logits, images, labels, noise)
        terms = dict(output.terms)
        if consistency_lbd > 0:
            terms["consistency"] = losses.consistency(
                output.logits, lbd=consistency_lbd, eta=consistency_eta, form=consistency_form
            )
        return Objective(loss=sum(terms.values()), terms=terms)

    return objective
