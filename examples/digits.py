"""A few digits, and a table of certificates, for all examples."""

import numpy as np

from rs_consistency import Certification, data


def load(number: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images `[N, 28, 28, 1]` float32 in [0, 1] and labels `[N]` of the digits inside the package."""
    images, labels = data.load("mnist_subset", split)
    return images[:number].astype(np.float32) / 255, labels[:number]


def show(name: str, result: Certification, labels: np.ndarray) -> None:
    """Print a line per image, and the average certified radius."""
    correct = result.prediction == labels
    for label, prediction, radius in zip(labels, result.prediction, result.radius, strict=True):
        print(f"label {label}  prediction {prediction:2d}  radius {radius:.3f}")
    print(f"{name}: {correct.sum()} of {len(labels)} correct, ACR {np.mean(result.radius * correct):.3f}")
