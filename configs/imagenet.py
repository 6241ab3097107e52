"""ImageNet, ResNet-50: the published settings of Jeong and Shin (NeurIPS 2020) and Salman et al. (NeurIPS 2019).

Papers: Consistency Regularization for Certified Robustness of Smoothed Classifiers; Provably Robust Deep Learning via
Adversarially Trained Smoothed Classifiers.

    python train.py --config=configs/imagenet.py --workdir=runs/imagenet                  # consistency, sigma 0.5
    python train.py --config=configs/imagenet.py:method=gaussian,sigma=1.0 --workdir=...  # another published cell
    python certify.py --workdir=runs/imagenet --skip=100

The text after the colon picks a published cell. The images are streamed: `--config.dataset.num_workers` processes
decode them. An epoch takes long, so there is a checkpoint every 1,000 steps. If memory is short, use
`--config.dtype=bfloat16`, or `--config.accumulate_steps=4`, which computes a step in four parts. Batch norm then sees
each part by itself, unlike in the published runs.

Needs the prepared dataset, `imagenet2012` of tensorflow-datasets, as array_record. ImageNet is not free to download:
`python -m rs_consistency.cli.prepare imagenet --manual_dir=DIR` needs a folder with ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar.

ACR over 500 validation images, n = 100,000, as the papers report it:

| method | sigma 0.25 | 0.50 | 1.00 |
|---|---|---|---|
| gaussian | .477 (427 images) | .733 | .875 |
| smoothadv | .532 (427 images) | .825 (427 images) | 1.040 (427 images) |
| consistency | - | .8215 | .9823 |
| catrs | - | - | 1.071 |
| sun | .529 | .842 | 1.043 |

Over all 500 images SmoothAdv's released files have .5349 / .8491 / 1.0786. The attack is PGD with one step, of radius
255/256 at sigma 0.5 and 512/256 at 1.0, on one noisy copy. The number at sigma 0.25 is of the attack DDN, which is not
implemented: it has no cell. The warm-up of 10 epochs is that of SmoothAdv's other runs; for ImageNet none is
published. SmoothAdv's networks subtract the channels' mean and do not divide by their deviation, unlike ours.

`catrs` (Jeong et al., AAAI 2023) and `sun` (Sun et al., ICML 2025) have no cells: they count votes on every training
image, which streamed images do not offer.

A run needs several GPUs and has not been timed here.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default
from rs_consistency.training.presets import apply_preset


def _smoothadv(epsilon: float) -> dict[str, Any]:
    settings = {"epsilon": epsilon, "num_steps": 1, "warmup_epochs": 10}
    return {"method": "smoothadv", "num_noise": 1, "smoothadv": settings}


PUBLISHED = {
    "gaussian": {sigma: {"method": "gaussian", "num_noise": 1} for sigma in (0.25, 0.5, 1.0)},
    "smoothadv": {0.5: _smoothadv(255 / 256), 1.0: _smoothadv(2.0)},
    "consistency": {
        sigma: {"method": "gaussian", "num_noise": 2, "consistency": {"lbd": 5.0, "eta": eta}}
        for sigma, eta in {0.5: 0.5, 1.0: 0.1}.items()
    },
}


def get_config(cell: str = "") -> ConfigDict:
    """Return the configuration of one published cell, such as `method=gaussian,sigma=0.25`."""
    config = default.get_config()
    config.dataset.name = "imagenet"
    config.dataset.num_workers = 16
    config.model = "resnet50"
    config.optimizer.lr = 0.1
    config.eval_batch_size = 200
    config.checkpoint_every_steps = 1000
    return apply_preset(config, cell, published=PUBLISHED, method="consistency", sigma=0.5)
