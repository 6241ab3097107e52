"""Configurations: published cells, and every bad setting by its message."""

import json
import os

import pytest

from configs import cifar10, default, demo, fashion_mnist, imagenet, mnist
from rs_consistency import UserError
from rs_consistency.cli.train import parse
from rs_consistency.methods import METHODS
from rs_consistency.training.config import check_keys, differing_keys, flatten, validate
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
        256,
        90,
        0.01,
        30,
    )
    assert (config.optimizer.momentum, config.optimizer.weight_decay, config.optimizer.lr_gamma) == (0.9, 1e-4, 0.1)
    validate(config, num_devices=8)


def test_every_config_has_the_keys_of_the_default():
    keys = flatten(default.get_config()).keys()
    assert flatten(mnist.get_config()).keys() == keys
    assert flatten(demo.get_config("method=gaussian")).keys() == keys
    assert flatten(fashion_mnist.get_config("method=macer")).keys() == keys
    for config_file in (cifar10, imagenet):
        assert flatten(config_file.get_config()).keys() == keys


EVERY_CELL = [
    (config_file, name, sigma)
    for config_file in (mnist, cifar10, imagenet)
    for name, cells in config_file.PUBLISHED.items()
    for sigma in cells
]


@pytest.mark.parametrize(("config_file", "name", "sigma"), EVERY_CELL)
def test_every_published_cell_is_valid_and_says_all_that_it_needs(config_file, name, sigma):
    config = config_file.get_config(f"method={name},sigma={sigma}")
    if name == "catrs":
        config.catrs.teacher = "runs/teacher"
    validate(config, num_devices=1)
    method, _, consistency = name.partition("+")
    assert config.method == ("gaussian" if name == "consistency" else method)
    assert (config.consistency.lbd > 0) == ("consistency" in (name, consistency))
    assert config.sigma == sigma
    # A cell sets every hyperparameter of its method, so that a change of a default cannot change it.
    own = {"gaussian": set(), "macer": {"lbd", "beta", "gamma", "deferred"}, "stability": {"lbd"}}.get(config.method)
    if own is None:
        own = set(config[config.method].keys()) - {"teacher", "num_votes"}
    cell = config_file.PUBLISHED[name][sigma]
    assert {"method", "num_noise"} <= cell.keys() and set(cell.get(config.method, {})) == own
    assert config.batch_size == (4096 if config.method == "macer" else 256)


def test_published_hyperparameters():
    def published(config_file, cell):
        return flatten(config_file.get_config(cell))

    found = published(mnist, "method=smoothadv+consistency,sigma=1.0")
    expected = {
        "method": "smoothadv",
        "num_noise": 4,
        "smoothadv.epsilon": 255 / 256,
        "smoothadv.num_steps": 10,
        "smoothadv.warmup_epochs": 10,
        "consistency.lbd": 1.0,
        "consistency.eta": 0.5,
    }
    assert {key: found[key] for key in expected} == expected
    assert published(mnist, "method=macer,sigma=1.0")["macer.lbd"] == 6
    assert published(mnist, "method=macer,sigma=0.5")["macer.deferred"] is True
    assert [published(mnist, f"method=smoothmix,sigma={s}")["smoothmix.num_steps"] for s in (0.25, 0.5, 1)] == [2, 4, 8]
    cifar = [published(cifar10, f"method=smoothadv,sigma={sigma}") for sigma in (0.25, 0.5, 1.0)]
    assert [(cell["num_noise"], cell["smoothadv.epsilon"]) for cell in cifar] == [(4, 1.0), (8, 1.0), (2, 2.0)]
    macer = [published(cifar10, f"method=macer,sigma={sigma}") for sigma in (0.25, 0.5, 1.0)]
    assert [(cell["macer.lbd"], cell["macer.deferred"]) for cell in macer] == [(12, False), (4, False), (12, True)]
    assert [published(cifar10, f"sigma={sigma}")["consistency.lbd"] for sigma in (0.25, 0.5, 1.0)] == [20, 10, 10]
    assert [published(cifar10, f"method=stability,sigma={s}")["stability.lbd"] for s in (0.25, 0.5, 1.0)] == [2, 2, 1]
    found = published(cifar10, "")
    assert (found["model"], found["num_epochs"], found["optimizer.lr"], found["optimizer.lr_step_size"]) == (
        "resnet110",
        150,
        0.1,
        50,
    )
    found = published(imagenet, "sigma=1.0")
    assert (found["model"], found["consistency.lbd"], found["consistency.eta"]) == ("resnet50", 5.0, 0.1)
    assert (found["num_epochs"], found["optimizer.lr"], found["optimizer.lr_step_size"]) == (90, 0.1, 30)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "method=magic",
            "method='magic' has no published settings here; use one of gaussian, stability, macer, consistency",
        ),
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
        (
            ["--config.consistency.lbd=1e9"],
            "consistency.lbd=1000000000.0: use a number of at least 0 and at most 1e+06",
        ),
        ([f"--config={ROOT}/configs/default.py:sigma=1"], "this file has no published cells"),
        (["--config.optimizer.lr=0"], "optimizer.lr=0.0: use a number greater than 0"),
        (["--config.seed=-1"], "seed=-1: use a whole number of at least 0 and at most 4294967295"),
        (["--config.num_devices=9"], "num_devices=9: this machine has 8 cpu device(s)"),
        (["--config.dtype=float16"], "dtype='float16' is unknown; use one of bfloat16, float32"),
        (
            ["--config.dataset.augment=mixup"],
            "dataset.augment='mixup' is unknown; use one of crop, crop_and_flip, none",
        ),
        (["--config.accumulate_steps=0"], "accumulate_steps=0: use a whole number of at least 1"),
        (
            ["--config.accumulate_steps=3"],
            "batch_size=64 is not divisible by num_noise=2 times accumulate_steps=3 times 8 device(s)",
        ),
        (["--config.checkpoint_every_steps=-1"], "checkpoint_every_steps=-1: use a whole number of at least 0"),
        (["--config.dataset.num_workers=-1"], "dataset.num_workers=-1: use a whole number of at least 0"),
        (["--config.init_from=/nowhere"], "init_from=/nowhere does not exist; give the folder of a run"),
        (["--config.method=stability", "--config.stability.lbd=-1"], "stability.lbd=-1.0: use a number of at least 0"),
        (
            ["--config.method=smoothadv", "--config.smoothadv.epsilon=-1"],
            "smoothadv.epsilon=-1.0: use a number of at least 0",
        ),
        (
            ["--config.method=smoothadv", "--config.smoothadv.num_steps=0"],
            "smoothadv.num_steps=0: use a whole number of at least 1",
        ),
        (["--config.method=macer", "--config.macer.beta=0"], "macer.beta=0.0: use a number greater than 0"),
        (["--config.method=macer", "--config.macer.gamma=nan"], "macer.gamma=nan: use a number of at least 0"),
        (
            ["--config.method=smoothmix", "--config.smoothmix.clean_step=9"],
            "smoothmix.clean_step=9: use a whole number of at least 0 and at most 4",
        ),
        (["--config.method=catrs"], "catrs.teacher='': method catrs needs the workdir of a Gaussian model"),
        (["--config.method=sun"], "sun.discard_epoch=60: the run has num_epochs=2, and would drop no example; use a"),
        (["--config.sun.discard_epoch=0"], "sun.discard_epoch=0: use a whole number of at least 1"),
        (["--config.sun.weigh_votes=9"], "sun.weigh_votes=9: use a whole number of at least 14"),
        (["--config.sun.discard_threshold=1.5"], "sun.discard_threshold=1.5: use a number of at least 0 and at most 1"),
        (["--config.macer.lbd=nan"], "macer.lbd=nan: use a number of at least 0 and at most 1e+06"),  # not in use
        (
            ["--config.smoothadv.epsilon=1e300"],
            "smoothadv.epsilon=1e+300: use a number of at least 0 and at most 1e+06",
        ),
        (["--config.smoothmix.step_size=1e39"], "smoothmix.step_size=1e+39: use a number greater than 0 and at most"),
        (["--config.sigma=1e30"], "sigma=1e+30: use a number greater than 0 and at most 1e+06"),
        (
            ["--config.smoothadv.warmup_epochs=10000000000"],
            "smoothadv.warmup_epochs=10000000000: use a whole number of at least 0 and at most 1000000000",
        ),
        (
            ["--config.dataset.name=imagenet", "--config.model=resnet50", "--config.dataset.augment=crop"],
            "dataset.augment='crop': images of imagenet are cropped and flipped as they are decoded; use none",
        ),
        (
            ["--config.method=catrs", "--config.catrs.teacher=/nowhere"],
            "catrs.teacher=/nowhere does not exist",
        ),
        (["--config.sgima=1"], "no such key: sgima (near: sigma); configs/default.py names every key"),
        (["--config.optimizer.speed=1"], "no such key: optimizer.speed (near: optimizer.lr"),
        (["--config.lr=1"], "no such key: lr (near: optimizer.lr)"),
        (["--config.optimizer[0]=1"], "no such key: optimizer[0]"),
        (["--config.=1"], "no such key: ;"),
        (["--config.items=1"], "no such key: items"),
        (["--config.optimizer={'lr': 0.1}"], "the config lacks a key: optimizer.lr_gamma; start from"),
        (["--config.optimizer={'lr': '0.1'}"], "optimizer.lr='0.1': use a number, such as 0.01"),
        (["--config.optimizer={1: 2}"], "no such key: optimizer.1"),
        (["--config.optimizer={'__class__': 1}"], "__class__ cannot be overridden"),
        (["--config.sun={}"], "the config lacks a key: sun.discard_epoch"),  # not in use
        (["--config.method=magic"], "method='magic' is unknown; use one of catrs, gaussian, macer"),
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


# Lines of a configuration file, whose `config` is the default and `raw` the same as a dictionary, and the error.
BAD_FILES = {
    "return": "get_config() of FILE returns NoneType; return a ConfigDict",
    "return {}": "get_config() of FILE returns dict; return a ConfigDict",
    "return raw": "get_config() of FILE returns dict",
    "return ConfigDict": "get_config() of FILE returns type",
    "yield config": "get_config() of FILE returns generator",
    "return ConfigDict()": "the config lacks a key: ",
    "return ConfigDict({'sigma': 0.5})": "the config lacks a key: ",
    "del raw['seed']": "the config lacks a key: seed; start from configs/default.py",
    "del raw['macer']['lbd']": "the config lacks a key: macer.lbd",
    "del raw['macer']; raw['method'] = 'macer'": "the config lacks a key: macer;",
    "raw['optimizer']['lr'] = '0.1'": "optimizer.lr='0.1': use a number, such as 0.01",
    "raw['sigma'] = [0.5]": "sigma=[0.5]: use a number, such as 0.5",
    "raw['sigma'] = {'a': 1}": "sigma=a block: use a number, such as 0.5",
    "raw['sigma'] = True": "sigma=True: use a number",
    "raw['sigma'] = None": "sigma=None: use a number",
    "raw['sigma'] = lambda: 1": "sigma=<function get",
    "raw['sigma'] = np.float32(0.5)": "sigma=np.float32(0.5): use a number",
    "raw['sigma'] = np.array([0.5])": "sigma=array([0.5]): use a number",
    "raw['sigma'] = 10**400": "use a number, such as 0.5",
    "raw['sigma'] = FieldReference('a')": "sigma='a': use a number",
    "raw['sigma'] = config_dict.placeholder(float)": "sigma=None: use a number",
    "raw['sigma'] = config_dict.required_placeholder(float)": "config has a placeholder without a value among sigma",
    "raw['sigma'] = float('nan')": "sigma=nan: use a number greater than 0",
    "raw['batch_size'] = 256.0": "batch_size=256.0: use a whole number, such as 256",
    "raw['batch_size'] = True": "batch_size=True: use a whole number",
    "raw['batch_size'] = np.int64(256)": "batch_size=np.int64(256): use a whole number",
    "raw['batch_size'] = 10**5000": "batch_size=<int>: use a whole number",
    "raw['macer']['deferred'] = 1": "macer.deferred=1: use True or False, such as True",
    "raw['model'] = ['lenet']": "model=['lenet']: use a text, such as 'lenet'",
    "raw['model'] = b'lenet'": "model=b'lenet': use a text",
    "raw['dataset']['data_dir'] = None": "dataset.data_dir=None: use a text, such as ''",
    "raw['num_devices'] = '0'": "num_devices='0': use a whole number, such as 0",
    "raw['optimizer'] = 3": "optimizer=3: use a block of keys",
    "raw['sun'] = None": "sun=None: use a block of keys",
    "raw['optimiser'] = {'lr': 1.0}": "no such key: optimiser (near: optimizer.lr)",
    "raw['mine'] = 1": "no such key: mine; configs/default.py names every key",
    "raw[7] = 1": "config has a key that is no text",
    "(lambda f: f(f))(lambda f: f(f))": "FILE, line 10: RecursionError: ",
    "return {}['x']": "FILE, line 10: KeyError: 'x'; mend the file",
    "return None.x": "FILE, line 10: AttributeError: 'NoneType' object has no attribute 'x'; mend the file",
    "raise OSError('no')": "FILE, line 10: OSError: no; mend the file",
    "open('/nowhere')": "FILE, line 10: FileNotFoundError: [Errno 2] No such file",
    "raise SystemExit(0)": "FILE, line 10: SystemExit: 0; mend the file",
    "raise GeneratorExit": "FILE, line 10: GeneratorExit: GeneratorExit; mend the file",
    "import nowhere": "FILE, line 10: ModuleNotFoundError: No module named 'nowhere'; mend the file",
    "(": "SyntaxError: '(' was never closed",
}
AROUND = """import numpy as np
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_dict

from configs import default


def get_config():
    config = default.get_config()
    raw = config.to_dict()
    LINES
    return ConfigDict(raw)
"""


def configured(folder, lines):
    file = folder / "config.py"
    file.write_text(AROUND.replace("LINES", lines))
    return file


@pytest.mark.parametrize("lines", BAD_FILES)
def test_bad_configuration_files(program, tmp_path, lines):
    file, run = configured(tmp_path, lines), tmp_path / "run"
    error = program.fails("cli.train", f"--config={file}", f"--workdir={run}")
    assert BAD_FILES[lines].replace("FILE", str(file)) in error and not run.exists()


@pytest.mark.parametrize(
    "lines",
    [
        "raw['sigma'] = 1",
        "raw['sigma'] = np.float64(0.5)",
        "raw['sigma'] = FieldReference(0.5)",
        "del raw['sun']",
        "return config",
        "return FrozenConfigDict(config)",
        "print('hello')",
    ],
)
def test_good_configuration_files(tmp_path, lines):
    config = parse([f"--config={configured(tmp_path, lines)}", "--config.model=resnet20"]).config
    validate(config, num_devices=1)
    assert json.loads(config.to_json())["sigma"] in (0.5, 1) and config.model == "resnet20"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "FILE has no function get_config; write one"),
        (b"get_config = 1", "FILE has no function get_config"),
        (b"def get_config(cell): pass", "get_config() of FILE needs a cell; write --config=FILE:CELL"),
        (b"import sys; sys.exit()", "FILE, line 1: SystemExit: SystemExit; mend the file"),
        (bytes(range(256)), "FILE: SyntaxError: source code string cannot contain null bytes"),
        (b"x = '\xff'", "FILE: SyntaxError: (unicode error) 'utf-8' codec"),
        (b"x = " + 5000 * b"(", "FILE: SyntaxError: too many nested parentheses"),
        (b"#" * 2**21, "FILE is damaged: it has more than 1048576 bytes"),
        (None, "FILE is not a regular file"),
    ],
)
def test_files_that_are_no_configuration(program, tmp_path, content, message):
    file = tmp_path / "config.py"
    file.mkdir() if content is None else file.write_bytes(content)
    assert message.replace("FILE", str(file)) in program.fails("cli.train", f"--config={file}", "--workdir=x")
    if content is None:
        file.rmdir()
        os.mkfifo(file)  # and never waits for it
        assert message.replace("FILE", str(file)) in program.fails("cli.train", f"--config={file}", "--workdir=x")


def test_a_method_from_elsewhere_brings_its_own_block(monkeypatch):
    config = default.get_config()
    config.mine, config.method = {"weight": "any"}, "mine"
    with pytest.raises(UserError, match="no such key: mine"):
        check_keys(config)
    monkeypatch.setitem(METHODS, "mine", METHODS["gaussian"])
    check_keys(config)
    check_keys(config.to_dict())


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


def test_blocks_of_methods_that_no_config_uses_shape_nothing():
    mine, older = mnist.get_config(), mnist.get_config()
    del older["sun"]  # a run from before the method
    older.macer.lbd = 3.0
    assert differing_keys(mine, older) == []
    validate(older, num_devices=1)
    for config in (mine, older):
        config.method = "macer"
    assert differing_keys(mine, older) == ["macer.lbd: 3.0 -> 16.0"]
    mine.method = "sun"
    assert "sun.epsilon: '(no such key)' -> 0.25" in differing_keys(mine, older)
