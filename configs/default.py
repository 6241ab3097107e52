"""Every key of a configuration, with its default: the published MNIST setting of the Gaussian baseline.

The other files start from this one and change some keys. Nothing in the project reads a key that is not here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the defaults."""
    config = ConfigDict()

    config.seed = 0  # seed of initial weights, data order and noise

    config.dataset = ConfigDict()
    config.dataset.name = "mnist_subset"  # a name of rs_consistency.data.DATASETS
    config.dataset.data_dir = ""  # prepared TFDS data; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.dataset.cache_dir = ""  # decoded arrays; empty: rs_consistency/ in $XDG_CACHE_HOME, else in ~/.cache

    # A name of rs_consistency.data.augment.AUGMENTATIONS; streamed images are cropped and flipped as they are decoded.
    config.dataset.augment = "none"
    config.dataset.num_workers = 2  # processes that decode a streamed dataset (imagenet); 0: the main process does

    config.model = "lenet"  # a name of rs_consistency.models.MODELS
    config.dtype = "float32"  # type in which the model computes: float32 or bfloat16; parameters stay float32
    config.init_from = ""  # workdir of another run: start from its newest checkpoint; empty: from scratch

    config.method = "gaussian"  # a name of rs_consistency.methods.METHODS
    config.sigma = 0.5  # standard deviation of the noise, in units of a [0, 1] pixel
    config.num_noise = 1  # M: noisy copies of an example in a step

    config.consistency = ConfigDict()  # a term added to the method's loss
    config.consistency.lbd = 0.0  # weight of the term; 0: no such term
    config.consistency.eta = 0.5  # weight of the entropy in the term
    config.consistency.form = "default"  # a name of rs_consistency.losses.FORMS

    # One block for each method; only the block of the chosen method is read.
    config.stability = ConfigDict()
    config.stability.lbd = 2.0  # weight of the agreement of clean and noisy prediction

    config.smoothadv = ConfigDict()
    config.smoothadv.epsilon = 255 / 256  # l2 radius of the attack
    config.smoothadv.num_steps = 10  # T: steps of the attack
    config.smoothadv.warmup_epochs = 10  # epochs over which epsilon grows; 0: at once

    config.macer = ConfigDict()
    config.macer.lbd = 16.0  # weight of the robustness term
    config.macer.beta = 16.0  # inverse temperature of the softmax in that term
    config.macer.gamma = 8.0  # hinge of that term
    config.macer.deferred = True  # lbd is 0 until after the first drop of the learning rate

    config.smoothmix = ConfigDict()
    config.smoothmix.num_steps = 4  # T: steps of the attack
    config.smoothmix.step_size = 1.0  # l2 length of a step
    config.smoothmix.clean_step = 0  # iterate of the attack that is the clean side; 0: the image itself
    config.smoothmix.eta = 5.0  # weight of the mixed term
    config.smoothmix.warmup_epochs = 10  # epochs over which eta grows; 0: at once

    config.catrs = ConfigDict()
    config.catrs.teacher = ""  # workdir of a Gaussian model on the same data (published: at sigma 0.25)
    config.catrs.num_votes = 10000  # votes of the teacher on a training image
    config.catrs.epsilon = 1.0  # l2 radius of the attack on the noise
    config.catrs.num_steps = 4  # T: steps of that attack
    config.catrs.lbd = 0.5  # weight of the term for examples of high confidence

    config.sun = ConfigDict()
    config.sun.discard_epoch = 60  # epoch (from 0) before which hard examples are dropped; weights and attack begin
    config.sun.discard_threshold = 0.5  # share of right votes below which an example is dropped
    config.sun.discard_votes = 100  # votes for that share
    config.sun.weigh_every = 10  # epochs between two weighings of the examples
    config.sun.weigh_votes = 16  # votes for a weight
    config.sun.epsilon = 0.25  # l2 length of a step of the attack on the noise, whose norm it keeps: no radius
    config.sun.num_steps = 3  # T: steps of that attack

    config.batch_size = 256  # noisy images in a step: batch_size / num_noise examples, num_noise copies of each
    # Parts of a batch that are computed one after the other: less memory, the same step. But batch norm, in models that
    # have it, sees each part by itself, and its running averages move once for every part.
    config.accumulate_steps = 1
    config.num_epochs = 90  # passes over the training set; M times as many steps as with M = 1
    config.optimizer = ConfigDict()  # SGD, as published
    config.optimizer.lr = 0.01  # learning rate of the first epochs
    config.optimizer.lr_step_size = 30  # epochs between two drops of the learning rate
    config.optimizer.lr_gamma = 0.1  # factor of a drop
    config.optimizer.momentum = 0.9  # not Nesterov
    config.optimizer.weight_decay = 1e-4  # coupled: added to the gradient, all parameters

    config.eval_batch_size = 1000  # test images in an evaluation step
    config.eval_every_epochs = 1  # epochs between two accuracies on one noisy copy of every test image
    config.checkpoint_every_epochs = 1  # epochs between two checkpoints
    config.checkpoint_every_steps = 0  # steps between two checkpoints within an epoch; 0: only at its end
    config.checkpoint_keep = 3  # number of newest checkpoints that stay on disk
    config.num_devices = 0  # devices to use; 0: all
    return config
