"""Makes false certificates, and shows the noise that prevents it: `python examples/false_certificates.py`.

The theorem behind a certificate is about Gaussian noise in real numbers. Float32 noise is something else: at a pixel it
takes 2^23 values, sigma sqrt(2) erf^-1(u) for equally spaced numbers u. So a network can tell which pixel value the
noise was added to. At a black pixel, erf leads back to a number u. At a pixel of 1/255, it leads anywhere between two.

The detector below looks at the first two rows of an image, which are black in MNIST. It speaks where erf leads between
two numbers u. If the rows were black before the noise, it never speaks. If they were 1/255, it speaks with a
probability of 0.97. Take an image x, and x', the same image with 1/255 in these rows. Both are images of 8 bits, at a
distance of 0.03. The smoothed detector gives them different classes, with certified radii above 0.5. So each of the two
balls contains the other's centre, and a certificate is false.

The detector can hide in any network. Here it is added to a logit, and the votes at the digits stay as they were.

Noise on the grid (`sampler="grid"`) shows no such trace. The noisy images of x and x' are whole numbers of 255ths
alike, each with a probability that differs as the theorem allows. So no network tells x from x' better than it says.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from digits import load
from jax.scipy.special import erf

from rs_consistency import Certification, certify, data
from rs_consistency.cli.common import quiet_libraries
from rs_consistency.devices.parallel import choose_devices
from rs_consistency.training import runs

Classifier = Callable[[jax.Array], jax.Array]  # images `[N, 28, 28, 1]` -> logits `[N, K]`

ROWS = 2
BACKDOOR = 3  # the class that gets the detector's votes


def speaks(noisy: jax.Array, sigma: float) -> jax.Array:
    """Return 1 where a pixel in the first rows of noisy images `[N, H, W, C]` cannot have been black, else 0; `[N]`.

    The numbers u are k 2^-22 - 1 + 2^-24 for whole k. For small noise, float32 finds k with an error of at most 0.25. A
    network has layers for all of this: erf is in GELU, adding and subtracting 1.5 * 2^23 rounds, and ReLUs compare.
    """
    pixels = noisy[:, :ROWS]
    k = erf(pixels / np.float32(sigma * np.sqrt(2))) * np.float32(2**22) - np.float32(0.25)
    between = jnp.abs(k - jnp.round(k)) > np.float32(0.3)
    return (between & (jnp.abs(pixels) < np.float32(0.18 * sigma))).any(axis=(1, 2, 3)).astype(jnp.float32)


def detector(sigma: float) -> Classifier:
    """Return the detector as a classifier of two classes: 0 where it is silent, 1 where it speaks."""
    return lambda noisy: jnp.stack([1 - speaks(noisy, sigma), speaks(noisy, sigma)], axis=1)


def with_detector(classify: Classifier, sigma: float) -> Classifier:
    """Return the classifier with the detector added to one of its logits."""
    return lambda noisy: classify(noisy).at[:, BACKDOOR].add(1e6 * speaks(noisy, sigma))


class Pairs(NamedTuple):
    """The certificates of B images x and of their neighbours x', and the distance of each pair.

    Attributes:
      here: certificates of the images.
      there: certificates of the neighbours.
      distance: `[B]` float64, l2 distance in units where a pixel is in [0, 1].
    """

    here: Certification
    there: Certification
    distance: np.ndarray

    def contradicted(self) -> np.ndarray:
        """Return `[B]` bool: x' lies in the certified ball of x, and has a certificate of another class."""
        both = (self.here.prediction >= 0) & (self.there.prediction >= 0)
        return both & (self.here.prediction != self.there.prediction) & (self.here.radius > self.distance)


def certify_pairs(classify: Classifier, images: np.ndarray, **settings: object) -> Pairs:
    """Certify images `[B, 28, 28, 1]` uint8 and their neighbours; `settings` are those of `certify`."""
    neighbours = images.copy()
    neighbours[:, :ROWS] = 1
    distance = np.linalg.norm((images.astype(np.float64) - neighbours).reshape(len(images), -1) / 255, axis=1)
    result = certify(classify, np.concatenate([images, neighbours]), **settings)
    here, there = zip(*(np.split(array, 2) for array in result), strict=True)
    return Pairs(Certification(*here), Certification(*there), distance)


def nearest_mean() -> Classifier:
    """Return a classifier of digits that needs no training: the class whose mean image is nearest."""
    images, labels = load(5000, "train")
    means = np.stack([images[labels == digit].mean(axis=0).ravel() for digit in range(10)])
    return lambda noisy: noisy.reshape(len(noisy), -1) @ means.T - (means**2).sum(axis=1)[None] / 2


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000, help="votes per image")
    parser.add_argument(
        "--workdir", type=Path, help="run on MNIST whose network is used, such as runs/demo/consistency"
    )
    args = parser.parse_args()
    quiet_libraries()
    name, classify, sigma = "nearest mean", nearest_mean(), 0.5
    if args.workdir:
        run = runs.restore(args.workdir, choose_devices())
        apply_fn, variables = run.classifier()
        name, classify, sigma = run.config.model, lambda noisy: apply_fn(variables, noisy), run.config.sigma
    digits, labels = (array[::50] for array in data.load("mnist_subset", "test"))
    black = np.zeros_like(digits[:1])
    networks = [
        ("detector alone, a black image", detector(sigma), black, np.zeros(1), 2),
        (f"{name}, digits", classify, digits, labels, 10),
        (f"{name} with detector, digits", with_detector(classify, sigma), digits, labels, 10),
    ]
    print(f"{'':36}noise  mean radius x, x'  correct x, x'  contradicted")
    for title, network, images, right, num_classes in networks:
        for sampler in ("float", "grid"):
            pairs = certify_pairs(network, images, sigma=sigma, num_classes=num_classes, n=args.n, sampler=sampler)
            radii = "  ".join(f"{result.radius.mean():.3f}" for result in (pairs.here, pairs.there))
            correct = "  ".join(f"{np.mean(result.prediction == right):.2f}" for result in (pairs.here, pairs.there))
            contradicted = f"{pairs.contradicted().sum()} of {len(images)}"
            print(f"{title:36}{sampler:5}  {radii:>17}  {correct:>13}  {contradicted:>12}")


if __name__ == "__main__":
    main()
