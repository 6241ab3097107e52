"""The demo: LeNet on the MNIST subset that comes with the package, in minutes on a laptop's CPU.

    make demo

trains `configs/demo.py` (consistency, sigma 0.5) and `configs/demo.py:method=gaussian`, certifies both on the same
test images and compares them. The settings are the same as in `configs/mnist.py`, except for the data (10,000 instead
of 60,000 images) and the schedule (12 epochs, the learning rate drops after 8). So its numbers are below the paper's.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config(cell: str = "") -> ConfigDict:
    """Return the configuration of the demo; `cell` as in `configs/mnist.py`."""
    config = mnist.get_config(cell)
    config.dataset.name = "mnist_subset"
    config.num_epochs = 12
    config.optimizer.lr_step_size = 8
    return config
