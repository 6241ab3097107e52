"""Certified robustness in JAX: consistency regularization and randomized smoothing.

import rs_consistency

result = rs_consistency.certify(apply_fn, images, sigma=0.5, num_classes=10)
result.prediction, result.radius
"""

import importlib
from typing import TYPE_CHECKING, Any

from rs_consistency.common.errors import UserError
from rs_consistency.statistics.bounds import ABSTAIN, certified_radius, lower_confidence_bound

if TYPE_CHECKING:
    from rs_consistency import losses
    from rs_consistency.certification import Certification, certify
    from rs_consistency.deciding import Decisions, decide
    from rs_consistency.prediction import Prediction, predict
    from rs_consistency.smoothed_classifier import SmoothedClassifier

__all__ = [
    "ABSTAIN",
    "Certification",
    "Decisions",
    "Prediction",
    "SmoothedClassifier",
    "UserError",
    "certified_radius",
    "certify",
    "decide",
    "losses",
    "lower_confidence_bound",
    "predict",
]

# What needs JAX is imported at its first use: analyze.py reads files and has no use for it.
_HOMES = {
    "Certification": "certification",
    "Decisions": "deciding",
    "Prediction": "prediction",
    "SmoothedClassifier": "smoothed_classifier",
    "certify": "certification",
    "decide": "deciding",
    "predict": "prediction",
}


def __getattr__(name: str) -> Any:
    """Imports what the package offers by that name."""
    if name == "losses":
        return importlib.import_module("rs_consistency.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'rs_consistency' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rs_consistency.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What the package offers."""
    return sorted({*globals(), *__all__})
