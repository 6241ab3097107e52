"""Random keys and Gaussian noise, addressed by global indices.

Every draw has an address: its purpose (a *stream*), and the step, example, copy or vote that it belongs to. The key of
an address is the root key with these indices folded in, one after the other. So a draw never depends on the number of
devices, the batch size, the order of computation or an interruption, and no key is used for two draws.

The random bits are those of `jax.random.bits`, but come from the cipher itself. So a draw does not depend on JAX's
settings, either: `jax_enable_x64`, `jax_threefry_partitionable`, `jax_default_prng_impl`. Draws are made flat and
shaped afterwards, which XLA compiles to faster code on a CPU.
"""

import math
from enum import IntEnum
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from rs_consistency.common.checks import (
    MAX_SEED,
    MOST,
    any_array,
    check_all,
    check_outside_jit,
    is_jax,
    number_array,
    one_of,
    shown,
    whole_array,
    whole_number,
)
from rs_consistency.common.errors import UserError

_CIPHER = "threefry2x32"


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
    ATTACK = 12


def stream_key(seed: int, stream: Stream) -> jax.Array:
    """Return the root key of a stream. It is always Threefry: results must not depend on JAX's default."""
    seed = whole_number("seed", seed, at_least=0, at_most=MAX_SEED)
    stream = whole_number("stream", stream, at_least=0, at_most=MAX_SEED)
    return jax.random.fold_in(jax.random.key(seed, impl=_CIPHER), stream)


def fold(key: jax.Array, *indices: jax.Array | int) -> jax.Array:
    """Return the key with several global indices folded in, in order."""
    key = checked_keys("key", key, ())
    for index in indices:
        key = jax.random.fold_in(key, _checked_index("index", index))
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
    key, positions, shape = checked_keys("key", key, ()), _checked_words("positions", positions, "[B]"), _checked(shape)
    step, num_noise = _checked_index("step", step), whole_number("num_noise", num_noise, at_least=0, at_most=MOST)
    over_batch = jax.vmap(lambda copy, position: fold(key, step, position, copy), in_axes=(None, 0))
    keys = jax.vmap(over_batch, in_axes=(0, None))(jnp.arange(num_noise, dtype=jnp.int32), positions)  # [M, B]
    return _normal(keys.ravel(), math.prod(shape)).reshape(*keys.shape, *shape)


def keys_of(key: jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the keys `[B]` of the examples at `positions` `[B]` of a step's global batch."""
    key, positions = checked_keys("key", key, ()), _checked_words("positions", positions, "[B]")
    step = _checked_index("step", step)
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
    keys, shape = _keys(key, addresses), _checked(shape)
    return _normal(keys, math.prod(shape)).reshape(len(keys), *shape)


Lookup = Literal["gather", "one_hot"]


def grid_noise(
    key: jax.Array,
    *addresses: jax.Array,
    shape: tuple[int, ...],
    packed: jax.Array,
    low: jax.Array,
    lookup: Lookup = "gather",
) -> jax.Array:
    """Return Gaussian noise rounded to whole steps of a grid, a draw for each row of the addresses.

    Guarantee: if Threefry is an ideal cipher, a row's law is within `sampler_error(sigma, math.prod(shape))` of the
    rounded Gaussian in total variation. No floating-point number is involved.

    Args:
      key: the stream's key.
      *addresses: one or more `[N]` int32 arrays, folded into the key in order.
      shape: `(H, W, C)`.
      packed: `[K]` uint32, of `statistics.rounded_gaussian.grid_table`. It contains sigma.
      low: `[K]` uint32, likewise.
      lookup: "gather", or "one_hot" for devices where gathers are slow, such as TPUs; the bits are the same.

    Returns:
      `[N, H, W, C]` int32 in steps; row j is a function of (key, addresses[0][j], addresses[1][j], ...) and the table.

    Example:
      The noise of two votes, in 255ths.

      >>> import jax.numpy as jnp
      >>> from rs_consistency import noise
      >>> from rs_consistency.statistics.rounded_gaussian import grid_table
      >>> table = grid_table(0.5)
      >>> key = noise.stream_key(0, noise.Stream.CERTIFY)
      >>> noise.grid_noise(key, jnp.arange(2), shape=(1, 4, 1), packed=table.packed, low=table.low)[..., 0].tolist()
      [[[229, 59, 9, -101]], [[218, 27, 149, -83]]]
    """
    keys, shape = _keys(key, addresses), _checked(shape)
    high_words, low_words = blocks(keys, math.prod(shape))
    draws = whole_numbers(high_words, low_words, packed=packed, low=low, lookup=lookup)
    return draws.reshape(len(keys), *shape)


def whole_numbers(
    high_words: jax.Array, low_words: jax.Array, *, packed: jax.Array, low: jax.Array, lookup: Lookup = "gather"
) -> jax.Array:
    """Return the whole numbers that a `GridTable` assigns to random words.

    The 64 bits of a draw are: the sign, b bits for the bucket, and 63 - b bits that are compared with its cut.

    Args:
      high_words: uint32 of any shape, the upper halves of the draws.
      low_words: uint32 of the same shape, the lower halves.
      packed: as for `grid_noise`.
      low: likewise.
      lookup: likewise.

    Returns:
      int32 of the same shape.
    """
    one_of("lookup", lookup, get_args(Lookup))
    packed, low, high_words, low_words = (
        jnp.asarray(_checked_words(name, value, axes), jnp.uint32)
        for name, value, axes in (
            ("packed", packed, "[K]"),
            ("low", low, "[K]"),
            ("high_words", high_words, ""),
            ("low_words", low_words, ""),
        )
    )
    if packed.shape != low.shape or len(packed).bit_count() != 1 or high_words.shape != low_words.shape:
        shapes = f"packed {packed.shape}, low {low.shape}, high_words {high_words.shape}, low_words {low_words.shape}"
        raise UserError(f"{shapes}: use the two arrays of a GridTable, [K] with a power of two, and words of one shape")
    b = len(packed).bit_length() - 1
    bucket = (high_words >> np.uint32(31 - b) & np.uint32(2**b - 1)).astype(jnp.int32)
    rest = high_words & np.uint32(2 ** (31 - b) - 1)
    if lookup == "gather":
        entry, low_cut = (table.at[bucket].get(mode="promise_in_bounds") for table in (packed, low))
    else:
        entry, low_cut = _by_one_hot(bucket, packed, low)
    cut = entry >> np.uint32(b)
    below = (rest < cut) | ((rest == cut) & (low_words < low_cut))
    size = jnp.where(below, bucket, (entry & np.uint32(2**b - 1)).astype(jnp.int32))
    return jnp.where(high_words >> np.uint32(31) != 0, -size, size)


_COLUMNS = 32  # entries of the table in a row of the matrix
_PRODUCT_ROWS = 2**16  # draws in one product: about 64 MiB


def _by_one_hot(bucket: jax.Array, packed: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both tables at `bucket`, without a gather.

    The tables' bytes are a matrix with 32 entries of the table in a row. The product with a one-hot vector is exact
    even in bfloat16, as a byte has 8 bits, and a single summand is not 0. The entry is then selected from its row.
    """
    columns = min(_COLUMNS, len(packed))
    octets = jnp.stack([table >> np.uint32(8 * i) & np.uint32(255) for table in (packed, low) for i in range(4)], -1)
    rows = octets.astype(jnp.bfloat16).reshape(-1, columns * 8)  # [K / 32, 32 * 8]

    def of_draw(bucket: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jax.nn.one_hot(bucket // np.int32(columns), len(rows), dtype=jnp.bfloat16)
        found = jnp.dot(row, rows, preferred_element_type=jnp.float32).reshape(columns, 8).astype(jnp.uint32)
        here = jnp.arange(columns, dtype=jnp.int32) == bucket % np.int32(columns)
        octet = jnp.where(here[:, None], found, np.uint32(0)).sum(axis=0, dtype=jnp.uint32)
        words = octet.reshape(2, 4) << jnp.array([[0, 8, 16, 24]], jnp.uint32)
        words = words.sum(axis=1, dtype=jnp.uint32)
        return words[0], words[1]

    entry, low_cut = jax.lax.map(of_draw, bucket.ravel(), batch_size=_PRODUCT_ROWS)
    return entry.reshape(bucket.shape), low_cut.reshape(bucket.shape)


def blocks(keys: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return both halves of the blocks 0, 1, ..., size - 1 of Threefry-2x32 under each of the keys.

    Args:
      keys: `[N]` Threefry keys.
      size: number of blocks, at most 2^32.

    Returns:
      Two arrays `[N, size]` uint32. Their XOR is `jax.random.bits(key, (size,))` of each key.
    """
    keys = checked_keys("keys", keys)
    if str(jax.random.key_impl(keys)) != _CIPHER:
        raise UserError(f"keys={shown(keys)}: use keys of {_CIPHER}, such as stream_key makes")
    size = whole_number("size", size, at_least=0, at_most=2**32)

    def of_key(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.key_data(key)
        count = jnp.arange(size, dtype=jnp.uint32)
        return threefry2x32_p.bind(first, second, jnp.zeros_like(count), count)

    return jax.vmap(of_key)(keys)


def _keys(key: jax.Array, addresses: tuple[jax.Array, ...]) -> jax.Array:
    """Return the key of each row of the addresses, `[N]`."""
    key, addresses = checked_keys("key", key, ()), tuple(_checked_words("address", each, "[N]") for each in addresses)
    if len({each.shape for each in addresses}) != 1:
        shapes = ", ".join(str(each.shape) for each in addresses)
        raise UserError(f"addresses of shapes {shapes or 'none'}: use one or more, all [N]")
    return jax.vmap(lambda *address: fold(key, *address))(*addresses)


def _bits(keys: jax.Array, size: int) -> jax.Array:
    """Return random words `[N, size]` uint32, as `jax.random.bits` draws them with each key."""
    high, low = blocks(keys, size)
    return high ^ low


def _normal(keys: jax.Array, size: int) -> jax.Array:
    """Return standard normal draws `[N, size]` float32, as `jax.random.normal` draws them with each key."""
    least = np.nextafter(np.float32(-1), np.float32(0))
    one_to_two = jax.lax.bitcast_convert_type(_bits(keys, size) >> np.uint32(9) | np.uint32(0x3F800000), jnp.float32)
    uniform = jnp.maximum(least, (one_to_two - np.float32(1)) * (np.float32(1) - least) + least)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)


def bound_uniform(seed: int, indices: np.ndarray) -> np.ndarray:
    """Return the uniform draws of the randomized bound, from (0, 1], a draw for each image.

    The seed of a certification commits to them: each is a function of (seed, index) alone, and no votes use its key.

    Args:
      seed: seed of the certification.
      indices: `[B]` numbers of the images in their dataset.

    Returns:
      `[B]` float64, multiples of 2**-53.
    """
    check_outside_jit("bound_uniform")
    indices = whole_array("indices", indices, "[B]").astype(np.int32)
    return _uniforms(_bits(_keys(stream_key(seed, Stream.BOUND), (indices,)), 2))


def weighted_draws(key: jax.Array, weights: np.ndarray) -> np.ndarray:
    """Return N draws with replacement from 0..N-1, each number with a probability proportional to its weight.

    Args:
      key: a random key.
      weights: `[N]`, at least 0, and not all of them 0.

    Returns:
      `[N]` int32. A number with weight 0 is never drawn.
    """
    check_outside_jit("weighted_draws")
    key, weights = checked_keys("key", key, ()), any_array("weights", number_array("weights", weights), "[N]")
    check_all("weights", weights, np.isfinite(weights) & (weights >= 0), "use numbers of at least 0")
    if not weights.any():
        raise UserError(f"weights={shown(weights)}: use at least one number above 0")
    ends = np.cumsum(weights, dtype=np.float64)
    uniforms = _uniforms(_bits(key[None], 2 * len(weights)).reshape(-1, 2))
    return np.searchsorted(ends, uniforms * ends[-1]).astype(np.int32)  # the first end at or after a draw in (0, last]


def _uniforms(words: jax.Array) -> np.ndarray:
    """Return numbers `[N]` float64 from (0, 1], multiples of 2**-53, from random words `[N, 2]` uint32."""
    high, low = np.asarray(words, np.uint64).T
    return ((high << np.uint64(21) | low >> np.uint64(11)) + np.uint64(1)) * 2.0**-53


def checked_keys(name: str, keys: jax.Array, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Return random keys of this shape, or `[N]` for None; a `UserError` for anything else.

    Threefry's may be pairs of uint32 on another axis, as `jax.random.PRNGKey` makes them.
    """
    if (is_jax(keys) or isinstance(keys, np.ndarray)) and keys.dtype == np.uint32 and keys.shape[-1:] == (2,):
        keys = jax.random.wrap_key_data(keys, impl=_CIPHER)
    is_key = is_jax(keys) and jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not is_key or (keys.ndim != 1 if shape is None else keys.shape != shape):
        axes = "[N]" if shape is None else shape
        raise UserError(f"{name}={shown(keys)}: use random keys of shape {axes}, such as stream_key makes")
    return keys


def _checked_words(name: str, value: Any, axes: str) -> Any:
    """Return whole numbers that fit into 32 bits, as int32 or uint32; JAX's, which have 32, are not looked at."""
    if is_jax(value):
        return any_array(name, value, axes, kinds="iu")
    value = any_array(name, number_array(name, value, kinds="iu"), axes)
    if value.dtype.itemsize == 4:
        return value
    check_all(name, value, (value >= 0) & (value <= MAX_SEED), f"use whole numbers from 0 to {MAX_SEED}")
    return value.astype(np.uint32)


def _checked_index(name: str, value: Any) -> Any:
    """Return an index of an address: an int, or JAX's without axes."""
    if is_jax(value) and not value.ndim:
        return any_array(name, value, kinds="iu")
    return whole_number(name, value, at_least=0, at_most=MAX_SEED)


def _checked(shape: Any) -> tuple[int, ...]:
    """Return the shape of an image."""
    if not isinstance(shape, tuple | list):
        raise UserError(f"shape={shown(shape)}: use whole numbers, such as (28, 28, 1)")
    return tuple(whole_number("shape", axis, at_least=0, at_most=MOST) for axis in shape)
