"""Configurations: published cells, and every bad setting by its message."""

import pytest

from configs import default, demo, mnist
from rs_consistency import UserError
from rs_consistency.config import differing_keys, flatten, validate
from tests.helpers import ROOT, TINY


@pytest.mark.parametrize(
    ("cell", "sigma", "num_noise", "lbd"),
    [
        ("", 0.5, 2, 5.0),
        ("sigma=0.25", 0.25, 2, 10.0),
        ("method=consistency,sigma=1", 1.0, 2, 5.0),
        ("method=gaussian,sigma=0.25", 0.25, 1, 0.0),
    ],
)
def test_published_cells(cell, sigma, num_noise, lbd):
    config = mnist.get_config(cell)
    assert (config.sigma, config.num_noise, config.consistency.lbd) == (sigma, num_noise, lbd)
    assert config.consistency.eta == 0.5
    assert (config.batch_size, config.num_epochs, config.optimizer.lr, config.optimizer.lr_step_size) == (
        256, 90, 0.01, 30,
    )  # fmt: skip
    assert (config.optimizer.momentum, config.optimizer.weight_decay, config.optimizer.lr_gamma) == (0.9, 1e-4, 0.1)
    validate(config, num_devices=8)


def test_every_config_has_the_keys_of_the_default():
    keys = flatten(default.get_config()).keys()
    assert flatten(mnist.get_config()).keys() == keys
    assert flatten(demo.get_config("method=gaussian")).keys() == keys


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("method=magic", "method='magic' has no published settings here; use one of gaussian, consistency"),
        ("sigma=0.3", r"was published for sigma 0\.25, 0\.5, 1\.0, not 0\.3"),
        ("sigma=big", "sigma='big' after the config file is not a number"),
        ("gaussian", "write method=NAME,sigma=NUMBER"),
        ("lbd=3", "write method=NAME,sigma=NUMBER"),
    ],
)
def test_cells_that_were_not_published(cell, message):
    with pytest.raises(UserError, match=message):
        mnist.get_config(cell)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.sigma=0"], "sigma=0.0: use a number greater than 0"),
        (["--config.sigma=-0.5"], "sigma=-0.5: use a number greater than 0"),
        (["--config.sigma=nan"], "sigma=nan: use a number greater than 0"),
        (["--config.sigma=much"], "--config.sigma=much: could not convert string to float"),
        (
            ["--config.num_noise=1"],
            "consistency.lbd=5.0 needs at least two noisy copies of an example, but num_noise=1",
        ),
        (["--config.consistency.lbd=-1"], "consistency.lbd=-1.0: use a number of at least 0"),
        (["--config.consistency.form=huber"], "consistency.form='huber' is unknown; use one of default, kl, mse, xent"),
        (["--config.batch_size=100"], "batch_size=100 is not divisible by num_noise=2 times 8 device(s)"),
        (["--config.num_noise=3"], "batch_size=64 is not divisible by num_noise=3 times 8 device(s)"),
        (["--config.batch_size=2.5"], "--config.batch_size=2.5: invalid literal"),
        (["--config.num_epochs=0"], "num_epochs=0: use a whole number of at least 1"),
        (["--config.optimizer.momentum=1"], "optimizer.momentum=1.0: use a number in [0, 1)"),
        (["--config.optimizer.lr_gamma=0"], "optimizer.lr_gamma=0.0: use a number greater than 0"),
        (["--config.batch_size=4294967296"], "batch_size=4294967296: use a whole number of at least 1 and at most"),
        (["--config.consistency.lbd=1e9"], "consistency.lbd=1000000000.0: use a number of at most 1e+06"),
        ([f"--config={ROOT}/configs/default.py:sigma=1"], "this file has no published cells"),
        (["--config.optimizer.lr=0"], "optimizer.lr=0.0: use a number greater than 0"),
        (["--config.seed=-1"], "seed=-1: use a whole number of at least 0 and at most 4294967295"),
        (["--config.num_devices=9"], "num_devices=9: this machine has 8 cpu device(s)"),
        (["--config.sgima=1"], "no such key: sgima"),
        (["--config.optimizer.speed=1"], "no such key: speed"),
        (["--config.method=magic"], "method='magic' is unknown; use one of gaussian"),
        (["--config.model=vgg"], "model='vgg' is unknown; use one of densenet40, lenet"),
        (["--config.dataset.name=minst"], "dataset.name='minst' is unknown; use one of cifar10"),
        (["--config.dataset.data_dir=/nowhere"], "dataset.name='mnist' is not prepared in /nowhere; prepare it with"),
        (["--speed=1"], "Unknown command line flag 'speed'"),
        (["fast"], "argument 'fast' is not understood"),
        ([f"--config={ROOT}/configs/nothing.py"], "--config cannot be read"),
        ([f"--config={ROOT}/configs/mnist.py:method=magic"], "method='magic' has no published settings here"),
        (["--config="], "Path to config file is an empty string"),
        (["--workdir="], "--workdir is missing"),
        (["--workdir=/dev/null"], "workdir=/dev/null is a file; choose a folder"),
        (["--workdir=/dev/null/run"], "/dev/null/run: Not a directory"),
        (["--workdir=/proc/run"], "/proc/run: No such file or directory"),
    ],
)
def test_bad_settings_of_train(program, tmp_path, arguments, message):
    error = program.fails("cli.train", *TINY, f"--workdir={tmp_path / 'run'}", *arguments)
    assert message in error
    assert not (tmp_path / "run").exists()  # nothing half-made


def test_help_of_every_program(program):
    for name, words in {
        "train": "--workdir",
        "certify": "error probability",
        "analyze": "certified_accuracy.png",
    }.items():
        assert words in program.succeeds(f"cli.{name}", "--help").out


def test_places_may_change_and_results_may_not():
    mine, other = mnist.get_config().to_dict(), mnist.get_config().to_dict()
    other["num_devices"], other["dataset"]["data_dir"] = 4, "elsewhere"
    assert differing_keys(mine, other) == []
    other["optimizer"]["lr"] = 0.5
    del other["seed"]
    assert differing_keys(mine, other) == ["optimizer.lr: 0.5 -> 0.01", "seed: '(no such key)' -> 0"]
