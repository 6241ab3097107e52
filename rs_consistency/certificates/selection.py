"""The images of a split that a certificate file is about, and their division among several machines."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.common.checks import shown
from rs_consistency.common.errors import UserError

_SHARD = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})")


class Shard(NamedTuple):
    """A share of a certification that `count` machines divide; its `index` is 1..count."""

    index: int
    count: int

    def __str__(self) -> str:
        """Return the text that the user writes, such as 2/5."""
        return f"{self.index}/{self.count}"

    @property
    def suffix(self) -> str:
        """The ending of its file's name."""
        return f"-{self.index}-of-{self.count}"

    def part(self, indices: Sequence[int]) -> Sequence[int]:
        """Return its share of the images: every count-th, so that each shard is a fair sample and takes as long.

        The shares of all shards are disjoint and make up the whole. More images at the end only add to a share.
        """
        return indices[self.index - 1 :: self.count]


def parse_shard(text: Any) -> Shard:
    """Read "2/5", the second of five shards.

    Raises:
      UserError: for anything but I/K with 1 <= I <= K.
    """
    found = _SHARD.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"shard={shown(text)}: use I/K, share I of K with 1 <= I <= K, such as 2/5")
    return Shard(int(found[1]), int(found[2]))


class Selection(NamedTuple):
    """The images that a file is to hold: the first `most` of every `skip`-th, and of these the part of a shard.

    Attributes:
      split_size: images in the split.
      skip: 1 for every image.
      most: images of all shards together, at most; None for no limit.
      shard: None for all images.
    """

    split_size: int
    skip: int = 1
    most: int | None = None
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """Number of images of all shards together."""
        size = -(-self.split_size // self.skip)
        return size if self.most is None else min(size, self.most)

    @property
    def images(self) -> range:
        """The image numbers, ascending: a range, whose memory does not grow with a number that a record claims.

        A shard without any raises a `UserError`.
        """
        whole = range(0, self.size * self.skip, self.skip)
        if self.shard is None:
            return whole
        if self.shard.index > len(whole):
            raise UserError(f"shard={self.shard}: there are only {len(whole)} images; use at most so many shards")
        return self.shard.part(whole)

    def indices(self) -> np.ndarray:
        """Return the `images` as an array, int64."""
        return np.array(self.images, np.int64)

    def identity(self) -> dict[str, Any]:
        """Return its part of a record's identity: all but `most`."""
        return {"skip": self.skip, "split_size": self.split_size, "shard": str(self.shard) if self.shard else None}
