"""Platforms that are not there, odd devices, and batches that have no room, before anything is allocated."""

import errno
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency import UserError, certify
from rs_consistency.devices import host, memory, parallel

IMAGES = np.zeros((1, 4, 4, 1), np.uint8)


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu'"), AssertionError()])
def test_a_platform_that_is_not_there(monkeypatch, error):
    def local_devices():
        raise error

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(UserError, match=r"JAX_PLATFORMS=cpu: JAX finds no such devices here .*; unset it"):
        parallel.choose_devices()


@pytest.mark.parametrize("number", [-1, 10**6, 0.5, "2", None, jnp.ones(2)])
def test_numbers_of_devices(number):
    with pytest.raises(UserError, match=r"num_devices=.*: this machine has 8 cpu device"):
        parallel.choose_devices(number)


def test_different_local_devices_of_one_platform_are_taken():
    assert parallel.check_devices(device for device in jax.devices()[:2]) == jax.devices()[:2]
    one = jax.devices()[0]
    for devices, message in [
        ([], r"devices=\[\]: give at least one"),
        (one, "devices=.*: give a list"),
        ("cpu", "devices has 'c', which is no device"),
        ([one, one], "devices has .* twice"),
        ([one, 0], "devices has 0, which is no device"),
    ]:
        with pytest.raises(UserError, match=message):
            parallel.check_devices(devices)


@pytest.mark.parametrize(
    ("about", "message"),
    [({"platform": "tpu"}, "two platforms, cpu and tpu"), ({"process_index": 1}, "belongs to another process")],
)
def test_devices_that_cannot_share_work(monkeypatch, about, message):
    other = SimpleNamespace(**{"platform": "cpu", "process_index": 0, **about})
    monkeypatch.setattr(jax, "Device", jax.Device | SimpleNamespace)
    with pytest.raises(UserError, match=message):
        parallel.check_devices([jax.devices()[0], other])


def wide(images):
    """A layer of 1,000 numbers for each image, and the logits."""
    pixels = images.reshape(len(images), -1)
    weights = jnp.ones((16, 1000))
    return jax.lax.cond(pixels.sum() > 0, lambda x: x @ weights, lambda x: -x @ weights, pixels)[:, :2]


@pytest.mark.parametrize(("free", "fits"), [(64 * 1000 * 4, True), (64 * 1000 * 4 - 1, False)])
def test_the_largest_layer_must_have_room(monkeypatch, free, fits):
    monkeypatch.setattr(memory, "_bytes_free", lambda devices: free)
    asked = {"sigma": 0.5, "num_classes": 2, "n0": 5, "n": 20, "alpha": 0.1, "batch_size": 64}
    if fits:
        certify(wide, IMAGES, **asked, devices=jax.devices()[:1])
        return
    message = r"batch_size=64: a batch needs at least .* MiB on each of 1 device\(s\), and .* are there; use a smaller"
    with pytest.raises(UserError, match=message):
        certify(wide, IMAGES, **asked, devices=jax.devices()[:1])


def test_free_memory_is_shared_by_the_devices_of_a_cpu():
    alone, shared = (memory._bytes_free(jax.devices()[:number]) for number in (1, 8))
    assert 2**20 < shared < alone / 4


def test_free_memory_of_accelerators():
    def device(limit):
        return SimpleNamespace(platform="gpu", memory_stats=lambda: limit and {"bytes_limit": limit})

    assert memory._bytes_free([device(2**30), device(2**29)]) == 2**29
    assert memory._bytes_free([device(None)]) is None


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size"])
def test_training_refuses_a_batch_without_room_and_writes_nothing(program, tmp_path, key):
    from tests.helpers import TOY

    size = 800_000_000
    error = program.fails("cli.train", *TOY, f"--workdir={tmp_path / 'run'}", f"--config.{key}={size}")
    assert error.startswith(f"error: {key}={size}: a batch needs at least")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["/proc/nothing", __file__, "a\0b"])
def test_a_folder_that_cannot_keep_compiled_programs(monkeypatch, capsys, folder):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", folder)
        host.check_compiled()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert capsys.readouterr().err.startswith("note: compiled programs are not kept: ")


def test_a_folder_that_only_cannot_be_written_serves_its_compiled_programs(monkeypatch, capsys, tmp_path):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system", dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        host.check_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "Read-only file system" in capsys.readouterr().err
