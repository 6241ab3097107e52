"""Which images of a split a certification is about, and how several machines share them."""

import re
from typing import Any, NamedTuple, Self

import numpy as np

from rs_consistency.common.checks import whole_number
from rs_consistency.common.errors import UserError

_SHARD = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})")


class Shard(NamedTuple):
    """One of `count` shares of a certification.

    Attributes:
      index: 1..count.
      count: how many there are.
    """

    index: int
    count: int

    def __str__(self) -> str:
        """As the user writes it: 2/5."""
        return f"{self.index}/{self.count}"

    @property
    def suffix(self) -> str:
        """What its file's name has more than that of the whole."""
        return f"-{self.index}-of-{self.count}"

    def part(self, indices: np.ndarray) -> np.ndarray:
        """Its share of the images `[B]`: every count-th, so that each shard is a fair sample and takes as long.

        The shares of all shards are disjoint and make up the whole. More images behind the others only add to a share.
        """
        return indices[self.index - 1 :: self.count]


def parse_shard(text: str) -> Shard:
    """Reads "2/5", the second of five shards.

    Raises:
      UserError: for anything else than I/K with 1 <= I <= K.
    """
    found = _SHARD.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"shard={text!r}: use I/K, share I of K with 1 <= I <= K, such as 2/5")
    return Shard(int(found[1]), int(found[2]))


class Selection(NamedTuple):
    """The images that a certificate file is to hold: the first `most` of every `skip`-th, and of those a shard's part.

    Attributes:
      split_size: images in the split.
      skip: 1 for every image.
      most: how many all shards together hold at most; None for no limit.
      shard: None for all.
    """

    split_size: int
    skip: int = 1
    most: int | None = None
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """How many images all shards together hold."""
        size = -(-self.split_size // self.skip)
        return size if self.most is None else min(size, self.most)

    def indices(self) -> np.ndarray:
        """The image numbers, int64, ascending.

        Raises:
          UserError: for a shard without any.
        """
        whole = np.arange(self.size) * self.skip
        if self.shard is None:
            return whole
        if self.shard.index > len(whole):
            raise UserError(f"shard={self.shard}: there are only {len(whole)} images; use at most so many shards")
        return self.shard.part(whole)

    def admitted(self) -> np.ndarray:
        """The image numbers without the limit `most`, which can be raised later; `indices` are the first of them."""
        return self._replace(most=None).indices()

    def identity(self) -> dict[str, Any]:
        """What of it the record of a file binds: all but `most`."""
        return {
            "skip": self.skip,
            "split_size": self.split_size,
            "shard": None if self.shard is None else str(self.shard),
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Self:
        """The selection that a record describes, with its `max` as `most`.

        Raises:
          UserError: when a value of the record cannot be.
          KeyError: when the record lacks a key.
        """
        return cls(
            split_size=whole_number("split_size", record["split_size"], at_least=1),
            skip=whole_number("skip", record["skip"], at_least=1),
            most=whole_number("max", record["max"], at_least=1),
            shard=None if record["shard"] is None else parse_shard(record["shard"]),
        )
