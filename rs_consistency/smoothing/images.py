"""Images in memory, checked, and their votes: the shared part of `certify`, `decide` and `predict`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from numpy.typing import ArrayLike

from rs_consistency import noise
from rs_consistency.common.checks import boolean, check_outside_jit, function, number_array, one_of, whole_array
from rs_consistency.common.errors import UserError
from rs_consistency.common.progress import progress_bar
from rs_consistency.devices import parallel
from rs_consistency.smoothing.votes import Votes, VoteSettings, count_votes, vote_settings
from rs_consistency.statistics.samplers import GRID, SAMPLERS

_Group = TypeVar("_Group", bound=tuple)  # arrays about some images: `Votes` or `Decisions`


class Task(NamedTuple):
    """Checked images `[B, H, W, C]`, uint8 or float32, their indices `[B]` int64, and the settings of their votes."""

    images: np.ndarray
    indices: np.ndarray
    devices: list[jax.Device]
    settings: VoteSettings

    def all_votes(
        self,
        apply_fn: Callable[[jax.Array], jax.Array],
        stream: noise.Stream,
        desc: str,
        progress: bool,
        plan: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Votes:
        """Return the votes of all images; `desc` names the progress bar on stderr, and `plan` is of `count_votes`."""
        asked = (lambda _, batch: apply_fn(batch), (), self.images, self.indices)
        groups = count_votes(*asked, settings=self.settings, devices=self.devices, stream=stream, plan=plan)
        none = np.zeros((0, self.settings.num_classes), np.int64)
        return join(Votes(none, none), groups, desc, len(self.images), progress)


def join(empty: _Group, groups: Iterable[_Group], desc: str, total: int, progress: bool) -> _Group:
    """Return groups of images as one group, each array of `empty` and theirs put together; with a progress bar."""
    parts = [empty]
    try:
        with progress_bar(desc, total, show=progress) as bar:
            for group in groups:
                parts.append(group)
                bar.update(len(group[0]))
    except jax.errors.JaxRuntimeError as error:
        if "callback" not in str(error):
            raise
        message = f"the model calls a function on the host, which fails: {str(error).strip().splitlines()[-1]}"
        raise UserError(message) from error
    return type(empty)(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def prepare(
    apply_fn: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    indices: ArrayLike | None,
    devices: Sequence[jax.Device] | None,
    *,
    sampler: str,
    progress: bool,
    **settings: Any,
) -> Task:
    """Check the arguments of a function about images; `settings` are those of `votes.vote_settings`."""
    check_outside_jit("a smoothed classifier")
    check_function(apply_fn)
    boolean("progress", progress)
    images = check_images(images, sampler)
    indices = check_indices(indices, len(images))
    devices = parallel.choose_devices() if devices is None else parallel.check_devices(devices)
    about = {"sampler": sampler, "image_shape": images.shape[1:], "devices": devices}
    return Task(images, indices, devices, vote_settings(**settings, **about))


def check_function(apply_fn: Any) -> None:
    """Raise a `UserError` for a classifier that cannot be called."""
    function("apply_fn", apply_fn, "from images [N, H, W, C] to logits [N, K]")


def check_images(images: ArrayLike, sampler: str) -> np.ndarray:
    """Return images as uint8 for noise on the grid, else as float32 in [0, 1], or uint8 where they were.

    Raises:
      UserError: for an unknown sampler, a shape other than `[B, H, W, C]`, or values that do not fit the sampler.
    """
    one_of("sampler", sampler, SAMPLERS)
    images = number_array("images", images, kinds="biufcmMOSUV")
    if images.dtype.kind not in "biuf":
        raise UserError(f"images are of type {images.dtype}; they must be uint8, or numbers in [0, 1]")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise UserError(f"images has shape {images.shape}; it must be [B, H, W, C], one image being images[None]")
    if images.dtype == np.uint8:
        return images
    if images.size and not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"images lie in [{images.min()}, {images.max()}]; they must be uint8, or numbers in [0, 1] (divided by 255)"
        )
    images = images.astype(np.float32)
    return images if sampler != GRID else _whole_levels(images)


def _whole_levels(images: np.ndarray) -> np.ndarray:
    """Return the levels, uint8, of float32 images that were made from levels by division or multiplication."""
    levels = np.rint(images * np.float32(255))
    whole = (images == levels / np.float32(255)) | (images == levels * np.float32(1 / 255))
    if not whole.all():
        raise UserError(
            f"images has the value {images[~whole][0]}, which is no whole multiple of 1/255; give uint8 images, or"
            " sampler='float'"
        )
    return levels.astype(np.uint8)


def check_indices(indices: ArrayLike | None, num_images: int) -> np.ndarray:
    """Return indices as int64 `[B]`, 0..B-1 for None; a `UserError` where they cannot number the images."""
    if indices is None:
        return np.arange(num_images)
    about = f"[B]: one number for each of {num_images} images"
    array = whole_array("indices", indices, about)
    if len(array) != num_images:
        raise UserError(f"indices has shape {array.shape}; it must be {about}")
    return array
