"""Augmentation of training images on the devices: compiled functions of keys and images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_PADDING = 4


def crop_and_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Return random crops of the original size after padding 4 pixels with zeros, mirrored half of the time.

    This is the published augmentation of CIFAR-10. Image b of `[B, H, W, C]` depends on keys[b] and images[b] alone.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        return _flip(flip_key, _crop(crop_key, image))

    return jax.vmap(one)(keys, images)


def crop(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Return random crops as `crop_and_flip`, but never mirrored: for digits and letters."""
    return jax.vmap(_crop)(keys, images)


def none(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Return the images unchanged."""
    del keys
    return images


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": jax.jit(none),
    "crop": jax.jit(crop),
    "crop_and_flip": jax.jit(crop_and_flip),
}


def _crop(key: jax.Array, image: jax.Array) -> jax.Array:
    padded = jnp.pad(image, ((_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * _PADDING + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _flip(key: jax.Array, image: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
