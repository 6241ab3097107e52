"""Trains a small flax nnx network on noisy digits and certifies it: `python examples/certify_nnx_model.py`.

Any network will do: certification needs a function from images to logits.
"""

import argparse

import jax
import optax
from digits import load, show
from flax import nnx

from rs_consistency import SmoothedClassifier

SIGMA = 0.25


class Network(nnx.Module):
    """Two dense layers on the pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(28 * 28, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `[N, 10]` of images `[N, 28, 28, 1]`."""
        return self.out(nnx.relu(self.hidden(images.reshape(len(images), -1))))


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array, key: jax.Array) -> None:
    """Take one step of Adam on one noisy copy of every image."""

    def loss(model: Network) -> jax.Array:
        noisy = images + SIGMA * jax.random.normal(key, images.shape)
        return optax.softmax_cross_entropy_with_integer_labels(model(noisy), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--n", type=int, default=10_000, help="votes per image")
    args = parser.parse_args()
    images, labels = load(2000, "train")
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    for step in range(args.steps):
        train_step(model, optimizer, images, labels, jax.random.key(step))

    model.eval()
    graph, state = nnx.split(model)  # for a pure function, which certification traces once
    smoothed = SmoothedClassifier(lambda batch: nnx.merge(graph, state)(batch), SIGMA, 10)
    images, labels = load(10, "test")
    show("nnx network", smoothed.certify(images, n=args.n, progress=True), labels)


if __name__ == "__main__":
    main()
