"""CIFAR-10, ResNet-110: the published settings of Jeong and Shin (NeurIPS 2020), and of the other methods.

Paper: Consistency Regularization for Certified Robustness of Smoothed Classifiers.

    python train.py --config=configs/cifar10.py --workdir=runs/cifar10                    # consistency, sigma 0.5
    python train.py --config=configs/cifar10.py:method=macer,sigma=0.25 --workdir=...     # another published cell
    python train.py --config=configs/cifar10.py --config.model=resnet20 --workdir=...     # a smaller model
    python certify.py --workdir=runs/cifar10

The text after the colon picks a published cell. Any key can still be overridden. If memory is short, use
`--config.dtype=bfloat16`, or `--config.accumulate_steps=4`, which computes a step in four parts. Batch norm then sees
each part by itself, unlike in the published runs.
`--config.dataset.name=cifar100` trains on CIFAR-100; for SVHN add `--config.dataset.augment=crop`, since digits have no
mirror images.

Needs the prepared dataset: `python -m rs_consistency.cli.prepare cifar10`.

Papers: the consistency paper above; Cohen et al. (ICML 2019, gaussian), Li et al. (NeurIPS 2019, stability), Salman
et al. (NeurIPS 2019, smoothadv), Zhai et al. (ICLR 2020, macer), Jeong et al. (NeurIPS 2021, smoothmix), Jeong et al.
(AAAI 2023, catrs), Sun et al. (ICML 2025, sun). ACR over the 10,000 test images, n = 100,000, ResNet-110, as the
papers report it:

| method | sigma 0.25 | 0.50 | 1.00 |
|---|---|---|---|
| gaussian | .424 | .525 | .511 |
| stability | .420 | .531 | .514 |
| smoothadv | .544 | .684 | .790 |
| macer | .531 | .691 | .744 |
| consistency | .552 | .720 | .756 |
| smoothadv+consistency | .548 | .726 | .816 |
| smoothmix | .553 | .736 | .788 |
| catrs | .562 | .757 | .815 |
| sun | .564 | .760 | .844 |

(smoothmix at sigma 1.0: a file of Sun et al., ICML 2025.) Sun et al. trained and certified the baselines anew, again
with all 10,000 images: gaussian .487 / .571 / .543, macer .529 / .680 / .760, consistency .547 / .716 / .757, smoothadv
.545 / .703 / .796, smoothmix .543 / .738 / .788.

At sigma 0.5 with ResNet-20: gaussian .5242, stability .4992, smoothadv .6924, macer .6607, consistency .6864; with
DenseNet-40 .4937, .4967, .6709, .6413, .6609. A run needs a GPU and has not been timed here.
`catrs` needs `--config.catrs.teacher=WORKDIR`, a Gaussian model at sigma 0.25. MACER's lbd at sigma 0.5 is the
published 4 (later work uses 6). The clean side of `smoothmix` at sigma 1.0 is the image after one step, as in the
repository of CAT-RS; SmoothMix's own repository lists 0 and 1.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default
from rs_consistency.training.presets import apply_preset

_SIGMAS = (0.25, 0.5, 1.0)


def _consistency(lbd: float) -> dict[str, Any]:
    return {"lbd": lbd, "eta": 0.5}


def _smoothadv(num_noise: int, epsilon: float) -> dict[str, Any]:
    settings = {"epsilon": epsilon, "num_steps": 10, "warmup_epochs": 10}
    return {"method": "smoothadv", "num_noise": num_noise, "smoothadv": settings}


def _macer(lbd: float, *, deferred: bool = False) -> dict[str, Any]:
    # 256 examples x 16 copies in a step.
    settings = {"lbd": lbd, "beta": 16.0, "gamma": 8.0, "deferred": deferred}
    return {"method": "macer", "num_noise": 16, "batch_size": 4096, "macer": settings}


def _smoothmix(step_size: float, clean_step: int) -> dict[str, Any]:
    settings = {"num_steps": 4, "step_size": step_size, "clean_step": clean_step, "eta": 5.0, "warmup_epochs": 10}
    return {"method": "smoothmix", "num_noise": 2, "smoothmix": settings}


def _catrs(lbd: float) -> dict[str, Any]:
    return {"method": "catrs", "num_noise": 4, "catrs": {"num_steps": 4, "epsilon": 1.0, "lbd": lbd}}


def _sun(discard_epoch: int, discard_threshold: float, epsilon: float, num_steps: int) -> dict[str, Any]:
    dropped = {"discard_epoch": discard_epoch, "discard_threshold": discard_threshold, "discard_votes": 100}
    settings = {**dropped, "weigh_every": 10, "weigh_votes": 16, "epsilon": epsilon, "num_steps": num_steps}
    return {"method": "sun", "num_noise": 4, "sun": settings}


PUBLISHED = {
    "gaussian": {sigma: {"method": "gaussian", "num_noise": 1} for sigma in _SIGMAS},
    "stability": {
        sigma: {"method": "stability", "num_noise": 1, "stability": {"lbd": lbd}}
        for sigma, lbd in {0.25: 2.0, 0.5: 2.0, 1.0: 1.0}.items()
    },
    "smoothadv": {0.25: _smoothadv(4, 1.0), 0.5: _smoothadv(8, 1.0), 1.0: _smoothadv(2, 2.0)},
    "macer": {0.25: _macer(12.0), 0.5: _macer(4.0), 1.0: _macer(12.0, deferred=True)},
    "consistency": {
        sigma: {"method": "gaussian", "num_noise": 2, "consistency": _consistency(lbd)}
        for sigma, lbd in {0.25: 20.0, 0.5: 10.0, 1.0: 10.0}.items()
    },
    "smoothadv+consistency": {
        0.25: {**_smoothadv(4, 255 / 256), "consistency": _consistency(2.0)},
        0.5: {**_smoothadv(2, 2.0), "consistency": _consistency(1.0)},
        1.0: {**_smoothadv(2, 2.0), "consistency": _consistency(1.0)},
    },
    "smoothmix": {0.25: _smoothmix(0.5, 0), 0.5: _smoothmix(1.0, 1), 1.0: _smoothmix(2.0, 1)},
    "catrs": {0.25: _catrs(0.5), 0.5: _catrs(1.0), 1.0: _catrs(2.0)},
    "sun": {0.25: _sun(60, 0.5, 0.25, 3), 0.5: _sun(70, 0.4, 0.25, 6), 1.0: _sun(60, 0.4, 0.5, 4)},
}


def get_config(cell: str = "") -> ConfigDict:
    """Return the configuration of one published cell, such as `method=gaussian,sigma=0.25`."""
    config = default.get_config()
    config.dataset.name = "cifar10"
    config.dataset.augment = "crop_and_flip"
    config.model = "resnet110"
    config.num_epochs = 150
    config.optimizer.lr = 0.1
    config.optimizer.lr_step_size = 50
    return apply_preset(config, cell, published=PUBLISHED, method="consistency", sigma=0.5)
