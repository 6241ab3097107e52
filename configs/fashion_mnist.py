"""Fashion-MNIST, LeNet: the settings of `configs/mnist.py` on other images of the same shape.

    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion                 # consistency, sigma 0.5
    python train.py --config=configs/fashion_mnist.py:method=macer,sigma=0.25 --workdir=...  # another cell
    python certify.py --workdir=runs/fashion

The hyperparameters of a cell are the published ones for MNIST; the papers report no numbers for this dataset.

Needs the prepared dataset: `python -m rs_consistency.data.prepare fashion_mnist`.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config(cell: str = "") -> ConfigDict:
    """Return the configuration of one cell, as in `configs/mnist.py`."""
    config = mnist.get_config(cell)
    config.dataset.name = "fashion_mnist"
    return config
