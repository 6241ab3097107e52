"""Certifies a function that is no network at all, and checks the radii: `python examples/certify_plain_function.py`.

The smoothed version of a linear classifier is known exactly: its true radius is the distance to the decision boundary.
So the example shows the price of certification. No radius may exceed the distance, and more votes come closer to it.
"""

import argparse

import jax.numpy as jnp
import numpy as np
from digits import load

from rs_consistency import SmoothedClassifier
from rs_consistency.statistics.bounds import radius_ceiling

SIGMA = 1.5


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="votes per image")
    args = parser.parse_args()
    images, labels = load(2000, "train")
    zero, one = (images[labels == digit].mean(axis=0) for digit in (0, 1))
    direction = one - zero
    middle = ((one + zero) / 2 * direction).sum()

    def score(batch: jnp.ndarray) -> jnp.ndarray:
        """Return the scores `[N]`, positive on the side of the ones."""
        return (batch * direction).sum(axis=(1, 2, 3)) - middle

    smoothed = SmoothedClassifier(lambda batch: jnp.stack([-score(batch), score(batch)], axis=1), SIGMA, 2)
    images, labels = load(100, "test")
    images, labels = images[labels < 2], labels[labels < 2]
    distance = np.abs(np.asarray(score(images))) / np.linalg.norm(direction)
    result = smoothed.certify(images, n=args.n)
    ceiling = float(radius_ceiling(args.n, alpha=0.001, sigma=SIGMA))  # the largest radius, however far the boundary is
    for label, prediction, radius, bound in zip(labels, result.prediction, result.radius, distance, strict=True):
        print(f"label {label}  prediction {prediction:2d}  radius {radius:.3f}  distance to the boundary {bound:.3f}")
    certified = result.prediction >= 0
    share = np.mean(result.radius / np.minimum(distance, ceiling))
    print(f"{certified.sum()} of {len(labels)} certified; radius / min(distance, ceiling {ceiling:.3f}): {share:.3f}")


if __name__ == "__main__":
    main()
