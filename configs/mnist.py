"""MNIST, LeNet: the published setting of Jeong and Shin (NeurIPS 2020).

Paper: Consistency Regularization for Certified Robustness of Smoothed Classifiers.

    python train.py --config=configs/mnist.py --workdir=runs/mnist                      # consistency, sigma 0.5
    python train.py --config=configs/mnist.py:method=gaussian,sigma=0.25 --workdir=...  # another published cell
    python certify.py --workdir=runs/mnist

The text after the colon picks a published cell: `method` is consistency or gaussian, `sigma` is 0.25, 0.5 or 1.0.
Any key can still be overridden, for example `--config.num_epochs=10`. `--config.sigma=...` alone changes sigma and
nothing else; the published lbd differs between sigmas.

Needs the prepared dataset: `python -m rs_consistency.data.prepare mnist`.

ACR over the 10,000 test images, n = 100,000, as the paper's authors reported it (5 seeds):

| method | sigma 0.25 | 0.50 | 1.00 |
|---|---|---|---|
| gaussian | 0.9108 | 1.5581 | 1.6184 |
| consistency | 0.9300 | 1.6653 | 1.7486 |
"""

from ml_collections import ConfigDict

from configs import default
from rs_consistency.presets import apply_preset

PUBLISHED = {
    "gaussian": {sigma: {"num_noise": 1} for sigma in (0.25, 0.5, 1.0)},
    "consistency": {
        0.25: {"num_noise": 2, "consistency": {"lbd": 10.0, "eta": 0.5}},
        0.5: {"num_noise": 2, "consistency": {"lbd": 5.0, "eta": 0.5}},
        1.0: {"num_noise": 2, "consistency": {"lbd": 5.0, "eta": 0.5}},
    },
}


def get_config(cell: str = "") -> ConfigDict:
    """The configuration of one published cell, such as `method=gaussian,sigma=0.25`."""
    config = default.get_config()
    config.dataset.name = "mnist"
    return apply_preset(config, cell, published=PUBLISHED, method="consistency", sigma=0.5)
