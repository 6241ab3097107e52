"""Noise on the grid: the cipher's words, the value of every word, the law, addresses, JAX's settings; broken twins."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rs_consistency import noise
from rs_consistency.statistics.rounded_gaussian import grid_table, size_units

LOOKUPS = ("gather", "one_hot")
KEY = noise.stream_key(5, noise.Stream.CERTIFY)
SHAPE = (4, 3, 2)


def threefry(key, counter):
    """Return a block of Threefry-2x32 with 20 rounds, in Python's whole numbers."""
    mask = 2**32 - 1
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = (x + y) & mask
            y = (y << rotation | y >> (32 - rotation)) & mask ^ x
        x = (x + keys[(group + 1) % 3]) & mask
        y = (y + keys[(group + 2) % 3] + group + 1) & mask
    return x, y


# Known answers of Random123, `threefry2x32 20`: key, counter, block.
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


def test_the_cipher_gives_the_known_answers():
    for key, counter, block in KNOWN:
        assert threefry(key, counter) == block
        words = (jnp.array([word], jnp.uint32) for word in (*key, *counter))
        assert [int(word[0]) for word in noise.threefry2x32_p.bind(*words)] == list(block)


def halves_of_bits(high, low, keys):
    bits = jax.vmap(lambda key: jax.random.bits(key, (high.shape[1],), jnp.uint32))(keys)
    return bool((high ^ low == bits).all())


def test_blocks_are_those_of_the_cipher():
    raw = [key for key, _, _ in KNOWN]
    keys = jax.random.wrap_key_data(jnp.array(raw, jnp.uint32), impl="threefry2x32")
    high, low = noise.blocks(keys, 7)
    assert high.dtype == low.dtype == jnp.uint32
    expected = [[threefry(key, (0, i)) for i in range(7)] for key in raw]
    np.testing.assert_array_equal(np.stack([high, low], -1), np.array(expected, np.uint32))
    assert halves_of_bits(high, low, keys)
    bits = jax.vmap(lambda key: jax.random.bits(key, (7,), jnp.uint32))(keys)
    assert not halves_of_bits(bits, bits, keys)  # one word for both


def test_keys_of_another_cipher_are_refused():
    with pytest.raises(ValueError, match="use keys of threefry2x32"):
        noise.blocks(jax.random.key(0, impl="rbg")[None], 3)


def unpack(table):
    """Return b, and the cut and other value of each bucket."""
    b = len(table.packed).bit_length() - 1
    cuts = [(entry >> b << 32) + low for entry, low in zip(table.packed.tolist(), table.low.tolist(), strict=True)]
    return b, cuts, (table.packed % 2**b).tolist()


def value_of(word, b, cuts, others):
    """Return the whole number of a 64-bit word, in Python's whole numbers."""
    negative, word = word >> 63, word & 2**63 - 1
    bucket, rest = word >> (63 - b), word & 2 ** (63 - b) - 1
    size = bucket if rest < cuts[bucket] else others[bucket]
    return -size if negative else size


def words_at_cuts(b, cuts, rng):
    """Return words at every cut and beside it, at borders of buckets and of half words, and random ones."""
    share, words = 2 ** (63 - b), []
    for bucket, cut in enumerate(cuts):
        borders = {0, 1, share - 1, cut - 1, cut, cut + 1, cut - 2**32, cut + 2**32, cut >> 32 << 32, cut | 2**32 - 1}
        words += [bucket * share + rest for rest in borders if 0 <= rest < share]
    words += [word | 2**63 for word in words[::3]]
    return words + [int.from_bytes(rng.bytes(8), "little") for _ in range(30_000)]


@pytest.mark.parametrize("sigma", [0.0004, 0.12, 1.0])
def test_every_word_gives_its_number(sigma):
    table = grid_table(sigma)
    b, cuts, others = unpack(table)
    words = words_at_cuts(b, cuts, np.random.default_rng(0))
    assert sigma < 1 or len(words) > noise._PRODUCT_ROWS  # more than one product of the one-hot form
    expected = np.array([value_of(word, b, cuts, others) for word in words])
    high, low_words = (jnp.array([word >> shift & 2**32 - 1 for word in words], jnp.uint32) for shift in (32, 0))

    def num_wrong(high, low_words, packed, low, lookup="gather"):
        draws = jax.jit(noise.whole_numbers, static_argnames="lookup")(
            high, low_words, packed=packed, low=low, lookup=lookup
        )
        assert draws.dtype == jnp.int32
        return (np.asarray(draws) != expected).sum()

    for lookup in LOOKUPS:
        assert num_wrong(high, low_words, table.packed, table.low, lookup) == 0
    if sigma == 0.0004:
        return  # two buckets, too few for twins
    assert num_wrong(high, low_words, table.packed, table.low + np.uint32(1)) > 200  # <= for <
    assert num_wrong(high, jnp.zeros_like(low_words), table.packed, table.low) > 200  # the lower word ignored
    reused = high & np.uint32(2**31 - 1) | high << np.uint32(31)  # the sign is another bit's
    assert num_wrong(reused, low_words, table.packed, table.low) > 2000
    assert num_wrong(high, low_words, table.packed, np.roll(table.low, 1)) > 200  # the neighbour's entry


grid_noise = jax.jit(noise.grid_noise, static_argnames=("shape", "lookup"))
addressed_noise = jax.jit(noise.addressed_noise, static_argnames="shape")
training_noise = jax.jit(noise.training_noise, static_argnames=("num_noise", "shape"))


def draw(*addresses, sigma=0.5, lookup="gather", key=KEY):
    table, addresses = grid_table(sigma), np.array(addresses, np.int32)
    return np.asarray(grid_noise(key, *addresses, shape=SHAPE, packed=table.packed, low=table.low, lookup=lookup))


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_grid_noise_is_the_table_at_the_words_of_the_address(lookup):
    addresses = [(7, 1, 0), (7, 0, 2**29), (2**31 - 1, 1, 12345)]
    unpacked = unpack(grid_table(0.5))
    expected = []
    for address in addresses:
        key = (0, 5)  # the seed
        for number in (noise.Stream.CERTIFY, *address):
            key = threefry(key, (0, int(number)))
        blocks = [threefry(key, (0, place)) for place in range(math.prod(SHAPE))]
        expected.append([value_of(high << 32 | low, *unpacked) for high, low in blocks])
    draws = draw(*zip(*addresses, strict=True), lookup=lookup)
    assert draws.dtype == np.int32 and draws.shape == (3, *SHAPE)
    np.testing.assert_array_equal(draws.reshape(3, -1), expected)


def batch_has_no_effect(sample):
    """Return whether each row of `sample(images, votes)` depends on its own address alone."""
    image, vote = np.divmod(np.arange(12), 4)
    draws = sample(image, vote)
    same = np.array_equal(sample(image[::-2], vote[::-2]), draws[::-2])
    return same and np.array_equal(sample(image[5:6], vote[5:6]), draws[5:6]) and len(np.unique(draws, axis=0)) == 12


def test_grid_noise_is_a_function_of_the_address():
    assert batch_has_no_effect(draw)
    assert batch_has_no_effect(lambda *address: np.asarray(addressed_noise(KEY, *address, shape=SHAPE)))
    table = grid_table(0.5)

    def counter_continues(image, vote):
        high, low = noise.blocks(noise.fold(KEY, 1)[None], len(image) * math.prod(SHAPE))
        return np.asarray(noise.whole_numbers(high, low, packed=table.packed, low=table.low)).reshape(-1, *SHAPE)

    assert not batch_has_no_effect(counter_continues)
    assert not np.array_equal(draw([0], [1]), draw([1], [0]))
    assert not np.array_equal(draw([0]), draw([0], key=noise.stream_key(6, noise.Stream.CERTIFY)))


def test_sigma_is_not_compiled_in():
    sample = jax.jit(lambda packed, low: noise.grid_noise(KEY, jnp.arange(3), shape=SHAPE, packed=packed, low=low))
    for sigma in (0.5, 0.45):  # tables of the same length
        table = grid_table(sigma)
        np.testing.assert_array_equal(sample(table.packed, table.low), draw(np.arange(3), sigma=sigma))
    assert sample._cache_size() == 1


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """1.2 million draws `[image, vote, H, W]` at sigma 0.25, with their words."""
    images, votes, shape = 4, 3000, (10, 10)
    image, vote = np.divmod(np.arange(images * votes), votes)
    keys = jax.vmap(lambda *address: noise.fold(KEY, *address))(jnp.asarray(image), jnp.asarray(vote))
    high, low_words = (np.asarray(words) for words in jax.jit(noise.blocks, static_argnums=1)(keys, math.prod(shape)))
    table = grid_table(0.25)
    draws = grid_noise(KEY, jnp.asarray(image), jnp.asarray(vote), shape=shape, packed=table.packed, low=table.low)
    return np.asarray(draws).reshape(images, votes, *shape), high.reshape(images, votes, *shape), low_words


def signed_law(units):
    """Return the probabilities of -T, ..., T, in float64."""
    size = np.array([unit / 2**63 for unit in units])
    return np.concatenate([size[:0:-1] / 2, size[:1], size[1:] / 2])


def law_p_value(draws, sigma):
    """Return the p-value of the chi^2 test; cells below 20 expected draws are pooled."""
    last = len(size_units(sigma)) - 1
    if np.abs(draws).max() > last:
        return 0.0
    return counts_p_value(np.bincount(draws.ravel() + last, minlength=2 * last + 1), sigma)


def counts_p_value(counts, sigma):
    """Return the same from the counts of -T, ..., T."""
    expected = signed_law(size_units(sigma)) * counts.sum()
    pooled = expected < 20
    counts = np.append(counts[~pooled], counts[pooled].sum())
    expected = np.append(expected[~pooled], expected[pooled].sum())
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def test_draws_follow_the_law(many):
    draws, high, _ = many
    assert draws.size >= 1e6 and law_p_value(draws, 0.25) > 1e-3
    size = np.abs(draws)
    assert law_p_value(np.where(high >> 21 & 1, -size, size), 0.25) < 1e-9  # the sign is the bucket's low bit
    assert law_p_value(draws, 0.255) < 1e-9  # sigma wrong by 2 %
    normal = np.random.default_rng(0).normal(size=draws.size) * 0.25 * 255
    assert law_p_value(np.rint(normal).astype(int), 0.25) > 1e-3
    assert law_p_value(np.trunc(normal).astype(int), 0.25) < 1e-9  # rounded towards 0
    assert law_p_value(np.clip(draws, -128, 127), 0.25) < 1e-9


def test_draws_are_symmetric(many):
    standard_error = np.sqrt((0.25 * 255) ** 2 + 1 / 12) / np.sqrt(many[0].size)
    assert abs(many[0].mean()) < 4 * standard_error
    normal = np.random.default_rng(0).normal(size=many[0].size) * 0.25 * 255
    assert abs(np.floor(normal).mean()) > 7 * standard_error  # rounded down


def largest_correlation(draws):
    """Return the largest correlation between neighbours, or of sign and size, in standard errors."""
    draws = draws.astype(np.float64)
    sign, size = np.sign(draws), np.abs(draws)
    pairs = [
        (draws[:, :, 1:], draws[:, :, :-1]),
        (draws[..., 1:], draws[..., :-1]),
        (size[..., 1:], size[..., :-1]),
        (draws[:, 1:], draws[:, :-1]),
        (draws[1:], draws[:-1]),
        (size[1:], size[:-1]),
        (sign, size),
        (sign[..., 1:], size[..., :-1]),
    ]
    return max(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size) for a, b in pairs)


def test_draws_are_uncorrelated(many):
    draws, high, _ = many
    assert largest_correlation(draws) < 4
    size = np.abs(draws)
    assert largest_correlation(np.where(high >> 30 & 1, -size, size)) > 50  # the sign is the bucket's high bit
    repeated = np.repeat(draws[..., ::2], 2, axis=-1)
    assert largest_correlation(repeated) > 50  # a block for two pixels
    assert largest_correlation(np.broadcast_to(draws[:1], draws.shape)) > 50  # the same noise for all images


def test_float_noise_rounded_is_refused_by_the_test_of_the_law(monkeypatch):
    """The counts are the exact law of its 2^23 values, so that no draws are needed; the table's own law passes."""

    @jax.jit
    def rounded(words):
        monkeypatch.setattr(noise, "_bits", lambda keys, size: words)
        normal = noise.addressed_noise(KEY, jnp.zeros(1, jnp.int32), shape=(2**23, 1, 1))
        return jnp.rint(normal * np.float32(127.5)).astype(jnp.int32)

    words = jnp.arange(2**23, dtype=jnp.uint32)[None] << np.uint32(9)
    draws, last = np.asarray(rounded(words)).ravel(), len(size_units(0.5)) - 1
    assert draws.max() < -draws.min() < last  # neither symmetric nor with the table's tails
    counts = np.bincount(draws + last, minlength=2 * last + 1)
    law = signed_law(size_units(0.5))
    assert np.abs(counts / counts.sum() - law).sum() / 2 > 1e-5
    assert counts_p_value(counts * 2**7, 0.5) < 1e-9  # 2^30 draws
    assert counts_p_value(law * 2**30, 0.5) > 0.999


# --- JAX's settings ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "not partitionable": lambda: jax.threefry_partitionable(False),
    "rbg": lambda: jax.default_prng_impl("rbg"),
}


def all_draws():
    """Return every kind of draw, made from seeds."""
    key, train = noise.stream_key(2**32 - 1, noise.Stream.CERTIFY), noise.stream_key(3, noise.Stream.TRAIN)
    numbers = np.arange(5)
    return {
        "grid": draw(numbers, numbers[::-1], key=key),
        "one-hot": draw(numbers, numbers[::-1], key=key, lookup="one_hot"),
        "addressed": np.asarray(addressed_noise(key, numbers, numbers, shape=SHAPE)),
        "training": np.asarray(training_noise(train, step=np.int32(3), positions=numbers, num_noise=2, shape=SHAPE)),
        "uniform": noise.bound_uniform(3, numbers),
        "weighted": noise.weighted_draws(train, numbers),
    }


def by_jax():
    """Return float noise by `jax.random.normal`, as JAX's settings have it: the twin."""
    return np.asarray(jax.random.normal(noise.fold(KEY, 3), SHAPE))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_jax_change_no_draw(name):
    usual, twin = all_draws(), by_jax()
    assert usual["grid"].dtype == np.int32 and usual["addressed"].dtype == np.float32
    with SETTINGS[name]():
        changed, changed_twin = all_draws(), by_jax()
        default = jax.random.key_data(jax.random.key(0)).shape
    for kind, draws in usual.items():
        np.testing.assert_array_equal(changed[kind], draws, err_msg=kind)
        assert changed[kind].dtype == draws.dtype, kind
    if name == "rbg":
        assert default == (4,)  # a key that does not name its cipher
    else:
        assert changed_twin.dtype != twin.dtype or not np.array_equal(changed_twin, twin)


# --- float noise, drawn flat ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (5, 7, 3)])
def test_float_noise_has_the_bits_of_jax_random_normal(shape):
    numbers = jnp.arange(6, dtype=jnp.int32)

    @jax.jit
    def flat(numbers):
        addressed = noise.addressed_noise(KEY, numbers, numbers * 3, shape=shape)
        return addressed, noise.training_noise(KEY, step=4, positions=numbers, num_noise=2, shape=shape)

    @jax.jit
    def shaped(numbers):
        def one(*address):
            return jax.random.normal(noise.fold(KEY, *address), shape, jnp.float32)

        addressed = jax.vmap(one)(numbers, numbers * 3)
        over_batch = jax.vmap(lambda copy, position: one(4, position, copy), in_axes=(None, 0))
        return addressed, jax.vmap(over_batch, in_axes=(0, None))(jnp.arange(2), numbers)

    for ours, theirs in zip(flat(numbers), shaped(numbers), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs)
        assert not np.array_equal(
            np.swapaxes(ours, -3, -2), np.asarray(theirs).reshape(np.swapaxes(ours, -3, -2).shape)
        )
