"""Training methods by name.

A method turns a batch and its noise into named loss terms. A new method is a module of this package and a line in
`METHODS`; the trainer knows no method by name. The consistency term is no method: it is added to every method, on the
logits of the M noisy copies that the method returns.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rs_consistency import losses
from rs_consistency.common.checks import one_of, shown
from rs_consistency.common.errors import UserError
from rs_consistency.methods import catrs, gaussian, macer, smoothadv, smoothmix, stability, sun
from rs_consistency.methods.base import Batch, Classifier, Method

METHODS: dict[str, Method] = {
    "gaussian": gaussian.METHOD,
    "stability": stability.METHOD,
    "smoothadv": smoothadv.METHOD,
    "macer": macer.METHOD,
    "smoothmix": smoothmix.METHOD,
    "catrs": catrs.METHOD,
    "sun": sun.METHOD,
}


class Objective(NamedTuple):
    """The loss of one batch.

    Attributes:
      loss: `[B]`, the sum of the terms.
      terms: name -> `[B]`.
    """

    loss: jax.Array
    terms: Mapping[str, jax.Array]


def make_objective(config: ConfigDict) -> Callable[[Classifier, Batch], Objective]:
    """Build the per-example objective of `config.method`, with the consistency term where its weight is positive.

    Returns:
      `objective(classifier, batch)`, to be called inside a compiled step.

    Raises:
      UserError: for an unknown method.
    """
    if not isinstance(config, ConfigDict) or not {"method", "consistency"} <= set(config):
        raise UserError(f"config={shown(config)}: use a configuration, such as configs/default.py makes")
    one_of("method", config.method, METHODS)
    method_terms = METHODS[config.method].build(config)
    lbd, eta, form = config.consistency.lbd, config.consistency.eta, config.consistency.form

    def objective(model: Classifier, batch: Batch) -> Objective:
        output = method_terms(model, batch)
        terms = dict(output.terms)
        if lbd > 0:
            terms["consistency"] = losses.consistency(output.logits, lbd=lbd, eta=eta, form=form)
        return Objective(loss=sum(terms.values()), terms=terms)

    return objective
