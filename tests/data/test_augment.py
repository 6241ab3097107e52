"""Augmentation against plain slices, and that it depends on keys and images alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency.data.augment import AUGMENTATIONS

SHAPE = (8, 6, 3)


def all_crops(image, flips):
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    height, width, _ = image.shape
    crops = {(i, j, 0): padded[i : i + height, j : j + width] for i in range(9) for j in range(9)}
    return {**crops, **({(i, j, 1): crop[:, ::-1] for (i, j, _), crop in crops.items()} if flips else {})}


@pytest.mark.parametrize("name", ["crop", "crop_and_flip"])
def test_every_crop_and_flip_is_as_likely(name):
    image = np.random.default_rng(0).uniform(0.1, 1, SHAPE).astype(np.float32)
    num_draws = 4000
    keys = jax.random.split(jax.random.key(1), num_draws)
    got = np.asarray(AUGMENTATIONS[name](keys, jnp.broadcast_to(image, (num_draws, *SHAPE))))
    crops = all_crops(image, flips=name == "crop_and_flip")
    found = {crop.tobytes(): where for where, crop in crops.items()}
    where = np.array([found[crop.tobytes()] for crop in got])  # a KeyError is a crop that cannot be
    for axis, values in ((0, 9), (1, 9), (2, 2 if name == "crop_and_flip" else 1)):
        shares = np.bincount(where[:, axis], minlength=values) / num_draws
        # Five standard errors of a share.
        np.testing.assert_allclose(shares, 1 / values, atol=5 * np.sqrt((1 - 1 / values) / values / num_draws))
    assert abs(np.corrcoef(where[:, 0], where[:, 1])[0, 1]) < 5 / np.sqrt(num_draws)


def test_an_image_depends_on_its_own_key_alone():
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(5, *SHAPE)), jnp.float32)
    keys = jax.random.split(jax.random.key(2), 5)
    augment = AUGMENTATIONS["crop_and_flip"]
    whole = augment(keys, images)
    np.testing.assert_array_equal(augment(keys[2:4], images[2:4]), whole[2:4])
    assert (augment(keys[::-1], images) != whole).any()


def test_none_leaves_the_images():
    images = jnp.ones((2, *SHAPE))
    np.testing.assert_array_equal(AUGMENTATIONS["none"](jax.random.split(jax.random.key(0), 2), images), images)
