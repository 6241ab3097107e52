"""The smoothed version of a classifier, as an object."""

from collections.abc import Callable
from typing import Any

import jax
from numpy.typing import ArrayLike

from rs_consistency.common.checks import LARGEST, MOST, number_above, shown, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.attack import Attacks, attack
from rs_consistency.smoothing.certify import Certification, certify
from rs_consistency.smoothing.decide import decide
from rs_consistency.smoothing.images import check_function
from rs_consistency.smoothing.pool import Decisions
from rs_consistency.smoothing.predict import Prediction, predict


class SmoothedClassifier:
    """g(x), the class that `apply_fn` gives most often for x + noise N(0, sigma^2 I).

    Source: Cohen, Rosenfeld, Kolter (ICML 2019).

    Its methods are `rs_consistency.predict`, `certify`, `decide` and `attack` with `apply_fn`, `sigma` and
    `num_classes` fixed. They share guarantees, further arguments and errors with these functions. alpha is the error
    probability of one statement about one image. Whoever predicts and certifies an image makes two statements, from
    independent votes.

    A linear classifier:

    >>> import numpy as np
    >>> from rs_consistency import SmoothedClassifier
    >>> is_bright = lambda images: (images.mean(axis=(1, 2)) - 0.5) * np.float32([[-1, 1]])
    >>> smoothed = SmoothedClassifier(is_bright, sigma=0.5, num_classes=2)
    >>> images = np.full((1, 4, 4, 1), 230, np.uint8)
    >>> smoothed.predict(images, n=100).prediction, smoothed.certify(images, n0=10, n=100).radius.round(3)
    (array([1]), array([0.75]))

    Attributes:
      apply_fn: function that JAX can trace, `[N, H, W, C]` float32 -> logits `[N, K]`. It includes normalization, a
        denoiser and anything else before the logits. The same image must give the same logits.
      sigma: standard deviation of the noise, in units of the images.
      num_classes: K.
    """

    def __init__(self, apply_fn: Callable[[jax.Array], jax.Array], sigma: float, num_classes: int) -> None:
        """Check the attributes; a `UserError` for one that cannot work."""
        check_function(apply_fn)
        self.apply_fn = apply_fn
        self.sigma = number_above("sigma", sigma, 0, at_most=LARGEST)
        self.num_classes = whole_number("num_classes", num_classes, at_least=1, at_most=MOST)

    def predict(self, images: ArrayLike, **settings: Any) -> Prediction:
        """Predict the classes of images `[B, H, W, C]`, or abstain; see `rs_consistency.predict`."""
        return predict(self.apply_fn, images, **self._with_own(settings))

    def certify(self, images: ArrayLike, **settings: Any) -> Certification:
        """Certify the classes of images `[B, H, W, C]`, with l2 radii; see `rs_consistency.certify`."""
        return certify(self.apply_fn, images, **self._with_own(settings))

    def decide(self, images: ArrayLike, radius: float, **settings: Any) -> Decisions:
        """Decide whether images `[B, H, W, C]` are certified at a radius; see `rs_consistency.decide`."""
        return decide(self.apply_fn, images, radius=radius, **self._with_own(settings))

    def attack(self, images: ArrayLike, **settings: Any) -> Attacks:
        """Find the nearest images of another class to images `[B, H, W, C]`; see `rs_consistency.attack`."""
        return attack(self.apply_fn, images, **self._with_own(settings))

    def _with_own(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a call with sigma and num_classes; a `UserError` where it names a fixed argument."""
        for name in ("apply_fn", "sigma", "num_classes"):
            if name in settings:
                raise UserError(
                    f"{name}={shown(settings[name])}: this smoothed classifier has {name}={shown(getattr(self, name))};"
                    " leave it out, or make another SmoothedClassifier"
                )
        return {"sigma": self.sigma, "num_classes": self.num_classes, **settings}

    def __repr__(self) -> str:
        name = getattr(self.apply_fn, "__name__", repr(self.apply_fn))
        return f"SmoothedClassifier({name}, sigma={self.sigma:g}, num_classes={self.num_classes})"
