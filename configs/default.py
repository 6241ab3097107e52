"""Every key of a configuration, with its default: the published MNIST setting of the Gaussian baseline.

The other files start from this one and change what differs. Nothing in the project reads a key that is not here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults."""
    config = ConfigDict()

    config.seed = 0  # of initial weights, data order and noise

    config.dataset = ConfigDict()
    config.dataset.name = "mnist_subset"  # a name of rs_consistency.data.DATASETS
    config.dataset.data_dir = ""  # prepared TFDS data; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.dataset.cache_dir = ""  # decoded arrays; empty: $XDG_CACHE_HOME or ~/.cache, /rs_consistency

    config.model = "lenet"  # a name of rs_consistency.models.MODELS

    config.method = "gaussian"  # a name of rs_consistency.methods.METHODS
    config.sigma = 0.5  # standard deviation of the noise, in units of a [0, 1] pixel
    config.num_noise = 1  # M: noisy copies of an example in a step

    config.consistency = ConfigDict()  # a term added to the method's loss
    config.consistency.lbd = 0.0  # its weight; 0: no such term
    config.consistency.eta = 0.5  # weight of the entropy in it
    config.consistency.form = "default"  # a name of rs_consistency.losses.FORMS

    config.batch_size = 256  # noisy images in a step: batch_size / num_noise examples, num_noise copies of each
    config.num_epochs = 90
    config.optimizer = ConfigDict()  # SGD, as published
    config.optimizer.lr = 0.01
    config.optimizer.lr_step_size = 30  # epochs between two drops of the learning rate
    config.optimizer.lr_gamma = 0.1  # factor of a drop
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4  # coupled: added to the gradient, all parameters

    config.eval_batch_size = 1000  # test images in an evaluation step
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 1
    config.checkpoint_keep = 3  # newest checkpoints that stay on disk
    config.num_devices = 0  # 0: all
    return config
