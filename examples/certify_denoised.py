"""Certifies a classifier that has never seen noise, behind a denoiser: `python examples/certify_denoised.py`.

Denoised smoothing (Salman et al., NeurIPS 2020) smooths classify(denoise(x)). The denoiser is part of the certified
function, so its quality changes the radii, never their truth. Here the denoiser is the best linear denoiser of digits
(a Wiener filter, from the covariance of the training images). The classifier is a logistic regression on clean digits.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load, show

from rs_consistency import SmoothedClassifier

SIGMA = 0.5


def fit(pixels: np.ndarray, labels: np.ndarray) -> jax.Array:
    """Return the weights `[D, 10]` of a logistic regression on clean pixels `[N, D]`."""
    optimizer = optax.adam(1e-2)

    def loss(weights: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(pixels @ weights, labels).mean()

    def step(_: int, state: tuple[jax.Array, optax.OptState]) -> tuple[jax.Array, optax.OptState]:
        weights, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(weights), opt_state)
        return optax.apply_updates(weights, updates), opt_state

    start = jnp.zeros((pixels.shape[1], 10))
    return jax.jit(lambda: jax.lax.fori_loop(0, 200, step, (start, optimizer.init(start))))()[0]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="votes per image")
    args = parser.parse_args()
    images, labels = load(5000, "train")
    pixels = images.reshape(len(images), -1)
    mean, covariance = pixels.mean(axis=0), np.cov(pixels.T)
    wiener = np.linalg.solve(covariance + SIGMA**2 * np.eye(len(covariance)), covariance).astype(np.float32)
    weights = fit(pixels, labels)

    def denoise(batch: jax.Array) -> jax.Array:
        return ((batch.reshape(len(batch), -1) - mean) @ wiener + mean).reshape(batch.shape)

    def classify(batch: jax.Array) -> jax.Array:
        return batch.reshape(len(batch), -1) @ weights

    images, labels = load(10, "test")
    plain = SmoothedClassifier(jax.jit(classify), SIGMA, 10).certify(images, n=args.n)
    denoised = SmoothedClassifier(lambda batch: classify(denoise(batch)), SIGMA, 10).certify(images, n=args.n)
    show("without denoiser", plain, labels)
    show("with denoiser", denoised, labels)
    print(f"mean radius {plain.radius.mean():.3f} without, {denoised.radius.mean():.3f} with the denoiser")


if __name__ == "__main__":
    main()
