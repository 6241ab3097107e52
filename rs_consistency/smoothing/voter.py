"""A vote: a noisy copy of an image, and the class that the network gives it.

With noise on the grid, the copy is an image of whole numbers v: the image's levels plus the noise, without clipping.
The network is a function f of v alone: v to float32, divided by 255, network, the class with the largest logit. The
copy and f are separated by a barrier, so that the compiler cannot compute f from anything but v.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import noise
from rs_consistency.common.checks import check_kind
from rs_consistency.common.errors import UserError, first_line
from rs_consistency.data import to_unit
from rs_consistency.devices.compiler import deterministic_options
from rs_consistency.devices.memory import check_memory, least_bytes
from rs_consistency.statistics.rounded_gaussian import grid_table
from rs_consistency.statistics.samplers import GRID

ApplyFn = Callable[[Any, jax.Array], jax.Array]  # (variables, images `[N, H, W, C]`) -> logits `[N, K]`

# A vote number is below it. One number for phase and vote: with the same number of folds, the keys of an image's votes
# are all different, because folding a number into a key is a permutation.
_PHASE_SHIFT = 30


class Voter(NamedTuple):
    """A network that votes on noisy copies of images: the part of the votes that is compiled.

    Attributes:
      apply_fn: (variables, `[N, H, W, C]` float32) -> logits `[N, K]`.
      num_classes: K.
      sampler: one of `samplers.SAMPLERS`.
      precision: one of `checks.PRECISIONS`, of the network's products in float32.
      lookup: how the devices read the table of the grid's noise, as in `noise.grid_noise`.
    """

    apply_fn: ApplyFn
    num_classes: int
    sampler: str
    precision: str
    lookup: noise.Lookup

    def compiler_options(self, platform: str) -> dict[str, bool] | None:
        """Return the XLA options of its votes on a platform: on the grid they count for one function, bit for bit."""
        return deterministic_options(platform) if self.sampler == GRID else None

    def noisy(
        self, images: jax.Array, *, key: jax.Array, addresses: tuple[jax.Array, jax.Array, jax.Array], scale: Any
    ) -> jax.Array:
        """Return noisy copies of images `[N, H, W, C]`, from `pixels`, on a device.

        Args:
          images: uint8 for noise on the grid, else float32.
          key: key of the noise stream.
          addresses: `[N]` int32 each: the image's index; 0 for the selection, 1 for the estimation; the vote's number.
          scale: from `scale_of`.

        Returns:
          `[N, H, W, C]`: int32 in steps of 1/255 for noise on the grid, else float32.
        """
        index, phase, vote = addresses
        shape = images.shape[1:]
        if self.sampler != GRID:
            return images + scale * noise.addressed_noise(key, index, phase, vote, shape=shape)
        packed, low = scale
        number = phase << _PHASE_SHIFT | vote
        draws = noise.grid_noise(key, index, number, shape=shape, packed=packed, low=low, lookup=self.lookup)
        return jax.lax.optimization_barrier(images.astype(jnp.int32) + draws)

    def inputs(self, noisy: jax.Array) -> jax.Array:
        """Return copies from `noisy` as the network takes them, float32."""
        return to_unit(noisy) if self.sampler == GRID else noisy

    def logits(self, variables: Any, noisy: jax.Array) -> jax.Array:
        """Return the network's logits `[N, K]` of copies from `noisy`."""
        with jax.default_matmul_precision(self.precision):
            return self.apply_fn(variables, self.inputs(noisy))

    def votes(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the votes of logits `[N, K]`, and a checksum of the bits of each row's logits in float32.

        Returns:
          `[N]` int32, the class with the largest logit, the lowest of equals; K where a logit is NaN.
          `[N]` int32, the sum of the bits times random odd numbers.
        """
        factors = np.random.default_rng(0).integers(2**31, size=self.num_classes).astype(np.uint32) * 2 + 1
        bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
        checksum = (bits * factors[None]).sum(axis=-1, dtype=jnp.uint32).astype(jnp.int32)
        largest = logits.argmax(axis=-1).astype(jnp.int32)
        return jnp.where(jnp.isnan(logits).any(axis=-1), np.int32(self.num_classes), largest), checksum

    def check(
        self, variables: Any, image_shape: tuple[int, ...], batch_size: int, devices: Sequence[jax.Device]
    ) -> None:
        """Raise a `UserError` for a network that does not map a batch of images to K logits each, or has no room.

        The batch is that of each device. Nothing is computed, and nothing allocated.
        """
        batch = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
        try:
            network, logits = jax.make_jaxpr(self.apply_fn, return_shape=True)(variables, batch)
        except Exception as error:  # a model may raise anything for images that do not fit
            message = f"the model does not accept images of shape {tuple(image_shape)}: {first_line(error)}"
            raise UserError(message) from error
        if getattr(logits, "shape", None) != (batch_size, self.num_classes):
            raise UserError(
                f"the model gives {getattr(logits, 'shape', type(logits).__name__)} for a batch of {batch_size} images,"
                f" but num_classes={self.num_classes} needs logits of shape {(batch_size, self.num_classes)}"
            )
        check_memory("batch_size", batch_size * len(devices), least_bytes(network.jaxpr, batch), devices)
        check_kind("logits of the model", logits, logits.dtype, "biuf")


def scale_of(sampler: str, sigma: float) -> Any:
    """Return sigma as `Voter.noisy` takes it: an argument of the compiled votes, not a constant in them."""
    if sampler != GRID:
        return np.float32(sigma)
    table = grid_table(sigma)
    return table.packed, table.low


def pixels(images: np.ndarray, sampler: str) -> np.ndarray:
    """Return images as the devices take them: uint8 for noise on the grid, else float32 in [0, 1].

    Raises:
      UserError: for images that are not uint8, and noise on the grid.
    """
    if sampler != GRID:
        return to_float(images)
    if images.dtype != np.uint8:
        raise UserError(f"images are {images.dtype}: noise on the grid needs uint8 images; or use sampler='float'")
    return images


def to_float(images: np.ndarray) -> np.ndarray:
    """Return images as float32 in [0, 1]; uint8 is divided by 255."""
    return np.asarray(images, np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)


def nan_error(index: int) -> UserError:
    """Return the error for an image with NaN among its logits."""
    return UserError(f"the model gives NaN for noisy copies of image {index}; check its parameters and normalization")
