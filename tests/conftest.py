"""Simulated CPU devices, strict JAX, a toy model, and a small prepared MNIST that nobody takes for the user's."""

import os

# XLA's compiler takes most of the suite's time. Without optimization, and with the older of its code generators, a
# LeNet step and two of a small ResNet compile in 10 CPU seconds instead of 26; results differ by rounding alone.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from pathlib import Path

import jax
import pytest
from jax._src.lru_cache import LRUCache

from rs_consistency import data
from rs_consistency.devices.host import compiled_folder
from tests import toy  # noqa: F401  registers the model
from tests.helpers import ROOT, TINY, TOY, Program, write_tfds

jax.config.update("jax_numpy_rank_promotion", "raise")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache for all processes of the suite and for its next runs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled_folder(ROOT / ".pytest_cache"))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def _put_whole(cache, key, value):
    """Store a compiled program at once. JAX writes it in place, where another worker may read half of it."""
    path = Path(cache.path) / f"{key}-cache"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(value)
        temporary.replace(path)


LRUCache.put = _put_whole


# The files that take longest, in order. They start first, so that no worker waits long for the other at the end.
_LONG = ("test_imagenet", "test_methods", "test_step", "test_report", "test_streaming", "test_loop", "test_runner")


def pytest_collection_modifyitems(items):
    places = {f"{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def tfds_dir(tmp_path_factory):
    """A TFDS folder with 200 training and 60 test images of MNIST, and a cache folder, for all programs."""
    folder = tmp_path_factory.mktemp("tfds")
    train, test = data.load("mnist_subset", "train"), data.load("mnist_subset", "test")
    write_tfds(
        folder,
        "mnist",
        "3.0.1",
        {"train": (train.images[:200], train.labels[:200]), "test": (test.images[:60], test.labels[:60])},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture
def program(capfd):
    """Return a runner of command-line programs in this process."""
    return Program(capfd)


def _train(tmp_path_factory, name, arguments):
    from rs_consistency.cli import train

    workdir = tmp_path_factory.mktemp(name) / "run"
    train.main([*arguments, f"--workdir={workdir}"])
    return workdir


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of LeNet, of two epochs, to copy from or to certify; not to be changed."""
    return _train(tmp_path_factory, "trained", TINY)


@pytest.fixture(scope="session")
def toy_trained(tmp_path_factory):
    """A finished run of the linear model, of two epochs, to copy from or to certify; not to be changed."""
    return _train(tmp_path_factory, "toy_trained", TOY)
