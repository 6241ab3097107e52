"""Fashion-MNIST, LeNet: the settings of `configs/mnist.py` on other images of the same shape.

    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion                 # consistency, sigma 0.5
    python train.py --config=configs/fashion_mnist.py:method=macer,sigma=0.25 --workdir=...  # another cell
    python certify.py --workdir=runs/fashion

Needs the prepared dataset: `python -m rs_consistency.cli.prepare fashion_mnist`.

ACR over the 10,000 test images, n = 100,000, one seed, from the files that CAT-RS (Jeong et al., AAAI 2023) released:

| method | sigma 0.25 | 0.50 | 1.00 |
|---|---|---|---|
| gaussian | .6701 | 1.0563 | 1.3163 |
| stability | .6886 | 1.1180 | 1.3939 |
| macer | .7268 | 1.1833 | 1.5045 |
| consistency | .7436 | 1.2118 | 1.4913 |
| smoothadv | .7559 | 1.2547 | 1.5380 |
| smoothmix | .7454 | 1.2369 | 1.5338 |
| catrs | .7566 | 1.2741 | 1.6068 |

Their logs show MNIST's schedules: 90 epochs, 150 for `catrs` and its teacher. The other hyperparameters were not
published for this dataset, so they are those of MNIST.
"""

from ml_collections import ConfigDict

from configs import mnist

PUBLISHED = mnist.PUBLISHED


def get_config(cell: str = "") -> ConfigDict:
    """Return the configuration of one cell, as in `configs/mnist.py`."""
    config = mnist.get_config(cell)
    config.dataset.name = "fashion_mnist"
    return config
