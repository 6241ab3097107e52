"""Eight simulated CPU devices, strict JAX, and a small prepared MNIST that no test can confuse with the user's."""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache for all processes of the suite, which compile the same functions over and over.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rs_consistency-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Most of the suite's time is XLA's, compiling; at this level it takes a quarter less, and the programs are as correct.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from rs_consistency import data
from tests.helpers import Program, write_tfds

jax.config.update("jax_numpy_rank_promotion", "raise")


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
    """Runs a command-line program in this process."""
    return Program(capfd)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of two epochs, to copy from or to certify; not to be changed."""
    from rs_consistency.cli import train
    from tests.helpers import TINY

    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.main([*TINY, f"--workdir={workdir}"])
    return workdir
