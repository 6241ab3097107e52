"""Order, crops and mirror images of a streamed dataset, on the host, as functions of seed, epoch and position."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

# The usual crop for ImageNet: limits of its share of the area and of width / height, and tries before the central crop.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
# Uniform numbers of an example: an area and a ratio for every try, two for the crop's position, the last for the flip.
DRAWS = 2 * _TRIES + 3

Visit = tuple[int, int, int]  # number of an example in the split, epoch, position in the epoch


@dataclass(frozen=True)
class TrainingOrder:
    """The examples in the order of training: a sequence of visits for Grain that is cheap to send to a worker."""

    num_examples: int
    seed: int
    epoch_length: int  # visits of an epoch, whose last batch is filled up from its start
    length: int  # visits of all epochs

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Visit:
        epoch, position = divmod(number, self.epoch_length)
        order = permutation(self.seed, epoch, self.num_examples)
        return int(order[position % self.num_examples]), epoch, position


def _philox(seed: int, epoch: int, stream: int, position: int) -> np.random.Philox:
    # NumPy promises to keep the raw output; the methods of its generators may change with a version.
    key, counter = np.array([seed % 2**64, epoch], np.uint64), np.array([0, 0, position, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter)


@lru_cache(maxsize=2)  # batches made ahead may belong to the next epoch
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Return the order `[N]` of the examples in an epoch, int32."""
    return np.argsort(_philox(seed, epoch, 0, 0).random_raw(num_examples), kind="stable").astype(np.int32)


def uniform(seed: int, epoch: int, position: int) -> np.ndarray:
    """Return the numbers `[DRAWS]`, float64 in [0, 1), of the example at a position of an epoch."""
    return (_philox(seed, epoch, 1, position).random_raw(DRAWS) >> np.uint64(11)) * 2.0**-53


def random_crop(image: Image.Image, size: int, draws: np.ndarray) -> Image.Image:
    """Return a random part of the image, resized to `[size, size]` and mirrored half of the time.

    The draws are the numbers of `uniform`.
    """
    left, top, width, height = crop_box(*image.size, draws)
    # The crop comes first: the filter of a resized box would use pixels beyond it.
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[-1] < 0.5 else image


def crop_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Return the crop's left, top, width and height, in pixels.

    It is the first of ten draws of area and ratio that fits, else the largest central crop with a ratio within limits.
    """
    areas = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[:_TRIES])
    ratios = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** draws[_TRIES : 2 * _TRIES]
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if fits.any():
        first = np.argmax(fits)
        w, h = int(widths[first]), int(heights[first])
        across, down = draws[2 * _TRIES : 2 * _TRIES + 2]
        return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def central_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the center `[size, size]` of the image, whose shorter side is first resized to 256/224 size."""
    short = round(size * 256 / 224)
    width, height = image.size
    width, height = max(short, short * width // height), max(short, short * height // width)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))
