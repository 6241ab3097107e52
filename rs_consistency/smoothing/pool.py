"""Decisions at one radius, with as many votes for each image as it needs: many images in flight.

A batch is made of *blocks* of `LOOK_EVERY` rows. A block is the next 16 votes of one image, or fewer at the end of its
selection and at the cap. The images of a *pool* on the devices take turns:

1. A finished image leaves its slot of the pool, and the next image is written into it. Nothing is recompiled.
2. The next batch is filled with the blocks that are the least ahead of what is known: first votes of the selection,
   which are always needed, then a block of each image that has none on its way, then a second one, and so on. The
   pool has two slots for each block of a batch, so while there are images enough, nothing is speculated. With few left
   each gets many blocks, and the batch is still full.
3. The batch is sent before the counts of the one before it are read: the devices work while the host decides.
4. The host looks at the counts block by block. The first block with a decision ends the image, and blocks beyond it are
   thrown away.

So the decision, and the number of votes it took, are a function of seed, image, index and settings, whatever the
batch size, the devices and the company, up to rounding in the model, which decides ties alone; only the order of the
images that finish depends on them.
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import noise
from rs_consistency.common.checks import LARGEST, number_from, probability
from rs_consistency.devices import parallel
from rs_consistency.smoothing.votes import VoteSettings, cast, check_model, nan_error, to_float
from rs_consistency.statistics import sequential
from rs_consistency.statistics.bounds import drawn_sigma

LOOK_EVERY = 16  # votes; part of the result's definition. A decision takes hundreds: 8 too many, on average, is little.
_SLOTS_PER_BLOCK = 2  # one image in the batch that runs, one in the batch that is sent meanwhile
_BATCHES_IN_FLIGHT = 2
_BLOCKS_PER_REFILL = 8  # an image takes more than 8 blocks, selection included: mostly one refill for a batch


def check_radius(radius: Any) -> float:
    """The radius of a decision as a float; a `UserError` for one that cannot be."""
    return abs(number_from("radius", radius, at_least=0, at_most=LARGEST))  # -0.0 is 0


class Decisions(NamedTuple):
    """Decisions about F images.

    Attributes:
      positions: `[F]` int64, places of the images among those given.
      indices: `[F]` int64, their numbers in the dataset.
      selected: `[F]` int64, the class that the decision is about; with equal votes the lowest.
      counts0: `[F, K]` int64, the n0 votes that selected it.
      hits: `[F]` int64, votes for it among the further ones.
      votes: `[F]` int64, how many those are: a multiple of `LOOK_EVERY`, or the cap.
      decision: `[F]` int8, 1 certified at the radius, -1 not certified, 0 undecided at the cap.
    """

    positions: np.ndarray
    indices: np.ndarray
    selected: np.ndarray
    counts0: np.ndarray
    hits: np.ndarray
    votes: np.ndarray
    decision: np.ndarray


def decide_images(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    images: np.ndarray,
    indices: np.ndarray,
    *,
    settings: VoteSettings,
    radius: float,
    alpha: float,
    devices: Sequence[jax.Device],
) -> Iterator[Decisions]:
    """Yields the decisions about the images as they finish, each image once, in no particular order.

    The votes are those of `votes.count_votes`: n0 for the selection, then those of the estimation from the first on.
    The test looks after `LOOK_EVERY`, 2 `LOOK_EVERY`, ... of them, and at the cap. NaN is an error in a vote that is
    used, not in those that are thrown away.

    Args:
      apply_fn: (variables, `[N, H, W, C]`) -> logits `[N, K]`.
      variables: passed through; replicated on the devices.
      images: `[B, H, W, C]`, float32 in [0, 1], or uint8.
      indices: `[B]`, the images' numbers in their dataset, 0..MAX_INDEX, which address the noise.
      settings: from `vote_settings`; n is the cap. A device takes the whole blocks that fit into its share of
        `batch_size`, at least one.
      radius: l2, at least 0, in units of the images.
      alpha: error probability of one image's statement, in (0, 1), at least 1e-100.
      devices: local devices that share a batch.

    Yields:
      Groups of one image or more.

    Raises:
      UserError: for a radius or alpha outside its range; when the model does not accept the images, does
        not give K logits, or gives NaN.
    """
    radius = check_radius(radius)
    alpha = probability("alpha", alpha)
    num_devices, num_classes, shape = len(devices), settings.num_classes, images.shape[1:]
    per_device = max(1, settings.batch_size // (num_devices * LOOK_EVERY))  # blocks
    num_blocks = per_device * num_devices
    check_model(apply_fn, variables, shape, num_classes=num_classes, batch_size=per_device * LOOK_EVERY)
    num_slots = min(max(len(images), 1), _SLOTS_PER_BLOCK * num_blocks)
    per_refill = min(num_slots, -(-num_blocks // _BLOCKS_PER_REFILL))
    key = noise.stream_key(settings.seed, noise.Stream.CERTIFY)

    def one_batch(
        shard: jax.Array,
        variables: Any,
        pool: jax.Array,  # [P, H, W, C]
        *,
        blocks: jax.Array,  # [N / D, 5], the columns of `_Blocks.columns`
    ) -> jax.Array:
        slot, index, phase, first, length = jnp.repeat(blocks, LOOK_EVERY, axis=0).T
        place = jnp.tile(jnp.arange(LOOK_EVERY), per_device)
        addresses = (index, phase, first + place)
        voted = cast(
            apply_fn,
            variables,
            pool[slot],
            key=key,
            addresses=addresses,
            sigma=settings.sigma,
            num_classes=num_classes,
        )
        block = jnp.repeat(jnp.arange(per_device), LOOK_EVERY)
        counts = jnp.zeros((num_devices, per_device, num_classes + 1), jnp.int32)  # the last class: NaN
        return parallel.sum_over_devices(counts.at[shard, block, voted].add((place < length).astype(jnp.int32)))

    def write(shard: jax.Array, pool: jax.Array, slots: jax.Array, images: jax.Array) -> jax.Array:
        return pool.at[slots].set(images, mode="drop")  # slot P, of what pads the last refill, is none

    compiled = parallel.spread(one_batch, devices=devices)
    compiled_write = parallel.spread(write, devices=devices, donate=(0,))
    variables = parallel.replicate(variables, devices)
    pool = parallel.replicate(np.zeros((num_slots, *shape), np.float32), devices)
    table = _Table(indices, num_slots=num_slots, settings=settings, radius=radius, alpha=alpha)
    in_flight: deque[tuple[_Blocks, jax.Array]] = deque()
    finished = None
    while True:
        while len(in_flight) < _BATCHES_IN_FLIGHT:
            slots, positions = table.refill()
            for start in range(0, len(slots), per_refill):
                padding = (0, max(0, start + per_refill - len(slots)))
                at = np.pad(slots[start : start + per_refill], padding, constant_values=num_slots)
                of = np.pad(positions[start : start + per_refill], padding)
                incoming = (at.astype(np.int32), to_float(images[of]))
                pool = compiled_write(pool, *parallel.replicate(incoming, devices))
            blocks = table.next_blocks(num_blocks)
            if not len(blocks.slot):
                break
            columns = blocks.columns(indices, settings, num_blocks).reshape(num_devices, per_device, 5)
            in_flight.append((blocks, compiled(variables, pool, blocks=parallel.divide(columns, devices))))
        if finished is not None:  # while the devices are busy
            yield finished
        if not in_flight:
            return
        blocks, counts = in_flight.popleft()
        finished = table.absorb(blocks, np.asarray(counts).reshape(num_blocks, num_classes + 1)[: len(blocks.slot)])


class _Blocks(NamedTuple):
    """The blocks of a batch: those of a slot side by side, in the order of the votes.

    Attributes:
      slot: `[N]` place in the pool.
      position: `[N]` of the image that is in it.
      number: `[N]` of the block among the image's, those of the selection first.
    """

    slot: np.ndarray
    position: np.ndarray
    number: np.ndarray

    def columns(self, indices: np.ndarray, settings: VoteSettings, num_blocks: int) -> np.ndarray:
        """`[num_blocks, 5]` int32: slot, index of the image, phase, first vote, number of votes; 0 for no block."""
        before = _selection_blocks(settings)
        phase = self.number >= before
        first = LOOK_EVERY * (self.number - before * phase)
        length = np.minimum(np.where(phase, settings.n, settings.n0) - first, LOOK_EVERY)
        columns = np.stack([self.slot, indices[self.position], phase, first, length], axis=1).astype(np.int32)
        return np.pad(columns, ((0, num_blocks - len(columns)), (0, 0)))


def _selection_blocks(settings: VoteSettings) -> int:
    return -(-settings.n0 // LOOK_EVERY)


class _Table:
    """What the host knows about the images in the pool, an entry for each slot."""

    def __init__(
        self, indices: np.ndarray, *, num_slots: int, settings: VoteSettings, radius: float, alpha: float
    ) -> None:
        self._indices, self._settings, self._radius, self._alpha = indices, settings, radius, alpha
        self._before = _selection_blocks(settings)
        self._total = self._before + -(-settings.n // LOOK_EVERY)
        self._next = 0  # position of the next image that has no slot yet
        self._position = np.full(num_slots, -1)  # of the image; -1: none
        self._sent = np.zeros(num_slots, np.int64)  # blocks
        self._known = np.zeros(num_slots, np.int64)  # of them, those whose counts are here
        self._counts0 = np.zeros((num_slots, settings.num_classes), np.int64)
        self._hits = np.zeros(num_slots, np.int64)

    def refill(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives the empty slots to the next images: slots and positions of those."""
        slots = np.flatnonzero(self._position < 0)[: len(self._indices) - self._next]
        positions = np.arange(self._next, self._next + len(slots))
        self._next += len(slots)
        self._position[slots] = positions
        for state in (self._sent, self._known, self._counts0, self._hits):
            state[slots] = 0
        return slots, positions

    def next_blocks(self, num_blocks: int) -> _Blocks:
        """The blocks to compute next: the least speculative ones, at most `num_blocks`."""
        left = np.where(self._position < 0, 0, self._total - self._sent)
        needed = np.maximum(self._known, self._before)  # what lies below is needed whatever the votes in flight are

        def up_to(level: int) -> np.ndarray:
            """Blocks of each slot that reach `level` beyond what is needed."""
            return np.clip(needed + level - self._sent, 0, left)

        levels = range(-self._before, self._total + 1)  # none at the lowest, all that are left at the highest
        level = levels[bisect.bisect_right(levels, num_blocks, key=lambda level: up_to(level).sum()) - 1]
        number = up_to(level)
        more = np.flatnonzero(up_to(level + 1) > number)[: num_blocks - number.sum()]
        number[more] += 1
        slot = np.repeat(np.arange(len(number)), number)
        place = np.arange(len(slot)) - np.repeat(np.cumsum(number) - number, number)
        blocks = _Blocks(slot, self._position[slot], self._sent[slot] + place)
        self._sent += number
        return blocks

    def absorb(self, blocks: _Blocks, counts: np.ndarray) -> Decisions | None:
        """Takes in the counts `[N, K + 1]` of the oldest batch that was sent; decisions, if there are any."""
        live = blocks.position == self._position[blocks.slot]  # not thrown away: its image is still undecided
        slot, number, nan = blocks.slot[live], blocks.number[live], counts[live, -1] > 0
        counts = counts[live, :-1].astype(np.int64)
        selecting = number < self._before
        np.add.at(self._counts0, slot[selecting], counts[selecting])
        last = np.full(len(self._position), self._total)  # block of each slot that is used

        measuring = ~selecting  # the image's selection is complete: blocks come in order
        slot_m, number_m = slot[measuring], number[measuring]
        selected = self._counts0.argmax(axis=1)
        hits = counts[measuring][np.arange(len(slot_m)), selected[slot_m]]
        running = np.cumsum(hits)
        first = np.searchsorted(slot_m, slot_m)  # where the blocks of the slot begin
        hits = running - (running - hits)[first] + self._hits[slot_m]
        votes = np.minimum(LOOK_EVERY * (number_m - self._before + 1), self._settings.n)
        sigma = drawn_sigma(self._settings.sigma)
        decision = sequential.decide(hits, votes, radius=self._radius, sigma=sigma, alpha=self._alpha)
        ends = np.flatnonzero((decision != sequential.UNDECIDED) | (votes == self._settings.n))
        done, at_first = np.unique(slot_m[ends], return_index=True)
        ends = ends[at_first]
        last[done] = number_m[ends]
        if (nan & (number <= last[slot])).any():
            bad = slot[nan & (number <= last[slot])][0]
            raise nan_error(self._indices[self._position[bad]])
        np.maximum.at(self._hits, slot_m, hits)
        np.maximum.at(self._known, slot, number + 1)
        if not len(done):
            return None
        positions = self._position[done]
        self._position[done] = -1
        return Decisions(
            positions,
            self._indices[positions],
            selected[done],
            self._counts0[done],
            hits[ends],
            votes[ends],
            decision[ends],
        )
