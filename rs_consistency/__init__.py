"""Certified l2 robustness in JAX: randomized smoothing, and training methods for it.

    import rs_consistency

    result = rs_consistency.certify(apply_fn, images, sigma=0.5, num_classes=10)
    result.prediction, result.radius  # per image: the class, or ABSTAIN, and the l2 radius within which it holds

`decide` answers for a single radius with fewer votes, `predict` returns the class alone, and `attack` finds near images
of another class. A `SmoothedClassifier` has all four as methods.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rs_consistency import attacks, data, losses, methods, models, noise
    from rs_consistency.common.errors import UserError
    from rs_consistency.smoothing.attack import Attacks, attack
    from rs_consistency.smoothing.certify import Certification, certify
    from rs_consistency.smoothing.classifier import SmoothedClassifier
    from rs_consistency.smoothing.decide import decide
    from rs_consistency.smoothing.pool import Decisions
    from rs_consistency.smoothing.predict import Prediction, predict
    from rs_consistency.statistics.bounds import ABSTAIN, certified_radius, lower_confidence_bound

__all__ = [
    "ABSTAIN",
    "Attacks",
    "Certification",
    "Decisions",
    "Prediction",
    "SmoothedClassifier",
    "UserError",
    "attack",
    "attacks",
    "certified_radius",
    "certify",
    "data",
    "decide",
    "losses",
    "lower_confidence_bound",
    "methods",
    "models",
    "noise",
    "predict",
]

# All is imported at its first use: analyze.py reads files without JAX, and programs are to start before slow imports.
_HOMES = {
    "ABSTAIN": "statistics.bounds",
    "Attacks": "smoothing.attack",
    "Certification": "smoothing.certify",
    "Decisions": "smoothing.pool",
    "Prediction": "smoothing.predict",
    "SmoothedClassifier": "smoothing.classifier",
    "UserError": "common.errors",
    "attack": "smoothing.attack",
    "certified_radius": "statistics.bounds",
    "certify": "smoothing.certify",
    "decide": "smoothing.decide",
    "lower_confidence_bound": "statistics.bounds",
    "predict": "smoothing.predict",
}


def __getattr__(name: str) -> Any:
    """Import and return a public name of the package."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"rs_consistency.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"rs_consistency.{name}")
    raise AttributeError(f"module 'rs_consistency' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that the package offers."""
    return sorted({*globals(), *__all__})
