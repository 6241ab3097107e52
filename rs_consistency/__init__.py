"""Certified robustness in JAX: consistency regularization and randomized smoothing.

import rs_consistency

result = rs_consistency.certify(apply_fn, images, sigma=0.5, num_classes=10)
result.prediction, result.radius
"""

from rs_consistency import losses
from rs_consistency.bounds import certified_radius, lower_confidence_bound
from rs_consistency.certification import ABSTAIN, Certification, certify
from rs_consistency.deciding import Decisions, decide
from rs_consistency.errors import UserError
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
