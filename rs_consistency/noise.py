"""Random keys and Gaussian noise, addressed by global indices.

Every draw has an address: its purpose (a *stream*), and the step, example, copy or vote that it belongs to. The key of
an address is the root key with these indices folded in, one after the other. So a draw never depends on the number of
devices, the batch size, the order of computation or an interruption, and no key is used for two draws.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np


class Stream(IntEnum):
    """The purpose of a key: the first index that is folded into the root key."""

    INIT = 0
    ORDER = 1
    TRAIN = 2
    EVAL = 3
    CERTIFY = 4
    METHOD = 5
    AUGMENT = 6
    TEACHER = 7
    BOUND = 8
    PREDICT = 9
    REPORT = 10
    CHOOSE = 11


def stream_key(seed: int, stream: Stream) -> jax.Array:
    """Return the root key of a stream. It is always Threefry: results must not depend on JAX's default."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), int(stream))


def fold(key: jax.Array, *indices: jax.Array | int) -> jax.Array:
    """Return the key with several global indices folded in, in order."""
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def training_noise(
    key: jax.Array, *, step: jax.Array, positions: jax.Array, num_noise: int, shape: tuple[int, ...]
) -> jax.Array:
    """Return the standard normal noise of a training step.

    Args:
      key: the `Stream.TRAIN` key.
      step: global step, int32.
      positions: `[B]` positions of the examples in the step's *global* batch, int32.
      num_noise: M.
      shape: `(H, W, C)`.

    Returns:
      `[M, B, H, W, C]` float32; entry `[i, b]` is a function of (key, step, positions[b], i) alone.
    """

    def draw(copy: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.normal(fold(key, step, position, copy), shape)

    over_batch = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_batch, in_axes=(0, None))(jnp.arange(num_noise), positions)


def keys_of(key: jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the keys `[B]` of the examples at `positions` `[B]` of a step's global batch."""
    return jax.vmap(lambda position: fold(key, step, position))(positions)


def addressed_noise(key: jax.Array, *addresses: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal noise, a draw for each row of the addresses.

    Args:
      key: the stream's key.
      *addresses: one or more `[N]` int32 arrays, folded into the key in order.
      shape: `(H, W, C)`.

    Returns:
      `[N, H, W, C]` float32; row j is a function of (key, addresses[0][j], addresses[1][j], ...) alone.
    """
    return jax.vmap(lambda *address: jax.random.normal(fold(key, *address), shape))(*addresses)


def bound_uniform(seed: int, indices: np.ndarray) -> np.ndarray:
    """Return the uniform draws of the randomized bound, from (0, 1], a draw for each image.

    The seed of a certification commits to them: each is a function of (seed, index) alone, and no votes use its key.

    Args:
      seed: seed of the certification.
      indices: `[B]` numbers of the images in their dataset.

    Returns:
      `[B]` float64, multiples of 2**-53.
    """
    key = stream_key(seed, Stream.BOUND)
    words = jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index), (2,), jnp.uint32))
    return _uniforms(words(jnp.asarray(indices, jnp.int32)))


def weighted_draws(key: jax.Array, weights: np.ndarray) -> np.ndarray:
    """Return N draws with replacement from 0..N-1, each number with a probability proportional to its weight.

    Args:
      key: a random key.
      weights: `[N]`, at least 0, and not all of them 0.

    Returns:
      `[N]` int32. A number with weight 0 is never drawn.
    """
    ends = np.cumsum(weights, dtype=np.float64)
    uniforms = _uniforms(jax.random.bits(key, (len(weights), 2), jnp.uint32))
    return np.searchsorted(ends, uniforms * ends[-1]).astype(np.int32)  # the first end at or after a draw in (0, last]


def _uniforms(words: jax.Array) -> np.ndarray:
    """Return numbers `[N]` float64 from (0, 1], multiples of 2**-53, from random words `[N, 2]` uint32."""
    high, low = np.asarray(words, np.uint64).T
    return ((high << np.uint64(21) | low >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
