"""ImageNet, ResNet-50: the published settings of Jeong and Shin (NeurIPS 2020).

Paper: Consistency Regularization for Certified Robustness of Smoothed Classifiers.

    python train.py --config=configs/imagenet.py --workdir=runs/imagenet                  # consistency, sigma 0.5
    python train.py --config=configs/imagenet.py:method=gaussian,sigma=1.0 --workdir=...  # another published cell
    python certify.py --workdir=runs/imagenet --skip=100

The text after the colon picks a published cell. The images are streamed: `--config.dataset.num_workers` processes
decode them. An epoch takes long, so there is a checkpoint every 1,000 steps. If memory is short, use
`--config.dtype=bfloat16`, or `--config.accumulate_steps=4`, which computes a step in four parts. Batch norm then sees
each part by itself, unlike in the published runs.

Needs the prepared dataset, `imagenet2012` of tensorflow-datasets, as array_record. ImageNet is not free to download:
`python -m rs_consistency.data.prepare imagenet --manual_dir=DIR` needs a folder with ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar.

ACR over 500 validation images, n = 100,000, as the paper reports it:

| method | sigma 0.25 | 0.50 | 1.00 |
|---|---|---|---|
| gaussian | .477 | .733 | .875 |
| consistency | - | .8215 | .9823 |

SmoothAdv reports .532 / .825 / 1.040; its settings for ImageNet are not known here. A run needs several GPUs and has
not been timed here.
"""

from ml_collections import ConfigDict

from configs import default
from rs_consistency.training.presets import apply_preset

PUBLISHED = {
    "gaussian": {sigma: {"method": "gaussian", "num_noise": 1} for sigma in (0.25, 0.5, 1.0)},
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
