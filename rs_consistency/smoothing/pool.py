"""The scheduler of `decide`: many images at a time, each with its own number of votes.

A batch is made of *blocks* of `LOOK_EVERY` rows. A block is the next 16 votes of one image, or fewer at the end of its
selection and at the cap. The images are in the slots of a *pool* on the devices:

1. When an image is finished, the next image is written into its slot. Nothing is recompiled.
2. The next batch is filled in rounds. A round gives one more block to the images that are the least ahead of their
   known votes. Blocks of the selection come first, since they are always needed. The pool has two slots for each block
   of a batch, so there is no speculation while enough images are left. Of the last images each gets many blocks, and
   the batch is still full.
3. A batch is sent before the counts of the batch before it are read: the devices work while the host decides.
4. The host looks at the counts block by block. The first block with a decision ends the image. Its later blocks are
   thrown away.

So the decision, and its number of votes, are a function of seed, image, index and settings. The batch size, the devices
and the other images have no effect, except through rounding in the model, which can only decide ties. They only change
the order in which images finish.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import noise
from rs_consistency.common.checks import LARGEST, number_from, probability
from rs_consistency.devices import parallel
from rs_consistency.smoothing.one_function import check_one_function
from rs_consistency.smoothing.voter import ApplyFn, Voter, nan_error, pixels
from rs_consistency.smoothing.votes import VoteSettings
from rs_consistency.statistics import sequential
from rs_consistency.statistics.samplers import GRID

LOOK_EVERY = 16  # votes; part of the result's definition. A decision takes hundreds: 8 too many, on average, is little.
_SLOTS_PER_BLOCK = 2  # one image in the batch that runs, one in the batch that is sent meanwhile
_BATCHES_IN_FLIGHT = 2
_BLOCKS_PER_REFILL = 8  # an image takes more than 8 blocks, selection included: mostly one refill for a batch


def rows_in_blocks(settings: VoteSettings) -> int:
    """Return the number of rows of a batch on each device: whole blocks, at least one."""
    return LOOK_EVERY * max(1, settings.rows_per_device // LOOK_EVERY)


def check_radius(radius: Any) -> float:
    """Return the radius of a decision as a float; a `UserError` for one outside its range."""
    return abs(number_from("radius", radius, at_least=0, at_most=LARGEST))  # -0.0 is 0


class Decisions(NamedTuple):
    """Decisions about F images.

    Attributes:
      positions: `[F]` int64, positions of the images among the given ones.
      indices: `[F]` int64, their numbers in the dataset.
      selected: `[F]` int64, the class that the decision is about; with equal votes the lowest.
      counts0: `[F, K]` int64, the n0 votes that selected it.
      hits: `[F]` int64, votes for it in the estimation.
      votes: `[F]` int64, votes of the estimation: a multiple of `LOOK_EVERY`, or the cap.
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
    apply_fn: ApplyFn,
    variables: Any,
    images: np.ndarray,
    indices: np.ndarray,
    *,
    settings: VoteSettings,
    radius: float,
    alpha: float,
    devices: Sequence[jax.Device],
) -> Iterator[Decisions]:
    """Yield the decisions about the images as they finish, each image once, in no particular order.

    The votes are the votes of `votes.count_votes`: n0 for the selection, then the estimation from its first vote on.
    The test looks after `LOOK_EVERY`, 2 `LOOK_EVERY`, ... of them, and at the cap. NaN is an error in a vote that is
    used, but not in a vote that is thrown away.

    `radius` and `alpha` are as for `decide`, the other arguments as for `votes.count_votes`. `settings.n` is the cap. A
    device takes the whole blocks that fit into `settings.rows_per_device`, at least one.

    Raises:
      UserError: for a radius or alpha outside its range, or a model that does not accept the images, does not give K
        logits, or gives NaN.
    """
    radius = check_radius(radius)
    alpha = probability("alpha", alpha)
    num_devices, shape = len(devices), images.shape[1:]
    rows = rows_in_blocks(settings)
    per_device = rows // LOOK_EVERY  # blocks
    num_blocks = per_device * num_devices
    voter = settings.voter(apply_fn, devices[0].platform)
    voter.check(variables, shape, rows, devices)
    num_slots = min(max(len(images), 1), _SLOTS_PER_BLOCK * num_blocks)
    per_refill = min(num_slots, -(-num_blocks // _BLOCKS_PER_REFILL))
    count_blocks, write = _compile(voter, per_device, devices)
    draws = settings.draws(noise.Stream.CERTIFY)
    replicated = parallel.replicate((variables, draws), devices)
    pool = parallel.replicate(pixels(np.zeros((num_slots, *shape), np.uint8), settings.sampler), devices)
    schedule = _Schedule(indices, num_slots=num_slots, settings=settings, radius=radius, alpha=alpha)
    in_flight: deque[tuple[_Blocks, jax.Array]] = deque()
    finished, tested = None, settings.sampler != GRID
    while True:
        while len(in_flight) < _BATCHES_IN_FLIGHT:
            slots, positions = schedule.refill()
            for start in range(0, len(slots), per_refill):
                padding = (0, max(0, start + per_refill - len(slots)))
                at = np.pad(slots[start : start + per_refill], padding, constant_values=num_slots)
                of = np.pad(positions[start : start + per_refill], padding)
                incoming = (at.astype(np.int32), pixels(images[of], settings.sampler))
                pool = write(pool, *parallel.replicate(incoming, devices))
            blocks = schedule.next_blocks(num_blocks)
            if not len(blocks.slot):
                break
            columns = schedule.columns(blocks, num_blocks).reshape(num_devices, per_device, 5)
            in_flight.append((blocks, count_blocks(*replicated, pool, blocks=parallel.divide(columns, devices))))
        if finished is not None:  # while the devices are busy
            yield finished
        if not in_flight:
            return
        blocks, counts = in_flight.popleft()
        counts = np.asarray(counts).reshape(num_blocks, -1)[: len(blocks.slot)]
        if not tested:
            block, row = np.divmod(np.arange(len(blocks.slot) * LOOK_EVERY), LOOK_EVERY)
            _, index, phase, first, length = schedule.columns(blocks, num_blocks)[block].T
            used = row < length
            check_one_function(
                voter,
                variables,
                images[blocks.position[block]],
                addresses=(index, phase, first + row),
                draws=draws,
                rows=rows,
                device=devices[0],
                group_of=np.where(used, block, len(counts)),
                counts=counts,
            )
            tested = True
        finished = schedule.absorb(blocks, counts[:, :-1])


def _compile(
    voter: Voter, per_device: int, devices: Sequence[jax.Device]
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Compile the votes of a batch of blocks, `[D, N / D, K + 2]`, and the writing of images into slots of the pool."""

    def count_blocks(
        shard: jax.Array, variables: Any, draws: dict[str, Any], pool: jax.Array, *, blocks: jax.Array
    ) -> jax.Array:
        # The pool is [P, H, W, C], the blocks are [N / D, 5], from `_Schedule.columns`.
        slot, index, phase, first, length = jnp.repeat(blocks, LOOK_EVERY, axis=0).T
        place = jnp.tile(jnp.arange(LOOK_EVERY, dtype=jnp.int32), per_device)
        noisy = voter.noisy(pool[slot], addresses=(index, phase, first + place), **draws)
        voted, checksum = voter.votes(voter.logits(variables, noisy))
        block = jnp.repeat(jnp.arange(per_device, dtype=jnp.int32), LOOK_EVERY)
        counts = jnp.zeros((len(devices), per_device, voter.num_classes + 2), jnp.int32)  # as in `votes.count_votes`
        used = (place < length).astype(jnp.int32)
        counts = counts.at[shard, block, voted].add(used).at[shard, block, -1].add(used * checksum)
        return parallel.sum_over_devices(counts)

    def write(shard: jax.Array, pool: jax.Array, slots: jax.Array, images: jax.Array) -> jax.Array:
        return pool.at[slots].set(images, mode="drop")  # the padding of a refill has slot P, which does not exist

    options = voter.compiler_options(devices[0].platform)
    return (
        parallel.spread(count_blocks, devices=devices, compiler_options=options),
        parallel.spread(write, devices=devices, donate=(0,)),
    )


class _Blocks(NamedTuple):
    """The N blocks of a batch, `[N]` each: slots of the pool, ascending, and the positions of the images in them.

    The `number` is the block's among the blocks of its image, which begin with the selection.
    """

    slot: np.ndarray
    position: np.ndarray
    number: np.ndarray


class _Schedule:
    """The host's view of the pool: for each slot, which image is in it, and which of its votes are known."""

    def __init__(
        self, indices: np.ndarray, *, num_slots: int, settings: VoteSettings, radius: float, alpha: float
    ) -> None:
        self._indices, self._settings, self._radius, self._alpha = indices, settings, radius, alpha
        self._selecting = -(-settings.n0 // LOOK_EVERY)  # blocks of the selection
        self._total = self._selecting + -(-settings.n // LOOK_EVERY)  # blocks of an image
        self._next = 0  # position of the next image without a slot
        self._position = np.full(num_slots, -1)  # position of the image in the slot; -1: none
        self._sent = np.zeros(num_slots, np.int64)  # blocks sent to the devices
        self._known = np.zeros(num_slots, np.int64)  # blocks whose counts are here
        self._counts0 = np.zeros((num_slots, settings.num_classes), np.int64)
        self._hits = np.zeros(num_slots, np.int64)

    def refill(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the empty slots to the next images; return these slots, and the positions of the images."""
        slots = np.flatnonzero(self._position < 0)[: len(self._indices) - self._next]
        positions = np.arange(self._next, self._next + len(slots))
        self._next += len(slots)
        self._position[slots] = positions
        for state in (self._sent, self._known, self._counts0, self._hits):
            state[slots] = 0
        return slots, positions

    def next_blocks(self, num_blocks: int) -> _Blocks:
        """Return the blocks of the next batch, at most `num_blocks`.

        They are dealt in rounds: one more block for each image that is the least ahead of its known blocks.
        """
        needed = np.maximum(self._known, self._selecting)  # whatever the votes in flight are
        sent, room = self._sent.copy(), num_blocks
        while room:
            has_more = (self._position >= 0) & (sent < self._total)
            if not has_more.any():
                break
            ahead = sent - needed
            least = np.flatnonzero(has_more & (ahead == ahead[has_more].min()))[:room]
            sent[least] += 1
            room -= len(least)
        slot = np.repeat(np.arange(len(sent)), sent - self._sent)
        number = self._sent[slot] + np.arange(len(slot)) - _first_of_slot(slot)
        self._sent = sent
        return _Blocks(slot, self._position[slot], number)

    def columns(self, blocks: _Blocks, num_blocks: int) -> np.ndarray:
        """Return `[num_blocks, 5]` int32: slot, index of the image, phase, first vote, number of votes; 0 for none."""
        phase = blocks.number >= self._selecting
        first = LOOK_EVERY * (blocks.number - self._selecting * phase)
        length = np.minimum(np.where(phase, self._settings.n, self._settings.n0) - first, LOOK_EVERY)
        columns = np.stack([blocks.slot, self._indices[blocks.position], phase, first, length], axis=1)
        return np.pad(columns.astype(np.int32), ((0, num_blocks - len(columns)), (0, 0)))

    def absorb(self, blocks: _Blocks, counts: np.ndarray) -> Decisions | None:
        """Take in the counts `[N, K + 1]` of the oldest batch in flight; return its decisions, if there are any."""
        used = blocks.position == self._position[blocks.slot]  # else the image was finished by an earlier batch
        slot, number = blocks.slot[used], blocks.number[used]
        counts, nan = counts[used, :-1].astype(np.int64), counts[used, -1] > 0
        self._known[slot] = number + 1  # of several blocks of a slot, the last counts
        selecting = number < self._selecting
        np.add.at(self._counts0, slot[selecting], counts[selecting])
        self._refuse(slot[selecting & nan])
        # Blocks come in order, so the selection of the images in the others is complete.
        return self._measure(*(each[~selecting] for each in (slot, number, counts, nan)))

    def _measure(self, slot: np.ndarray, number: np.ndarray, counts: np.ndarray, nan: np.ndarray) -> Decisions | None:
        """Look after each block of the estimation; the first block with a decision, or at the cap, ends its image."""
        selected = self._counts0[slot].argmax(axis=1)
        hits = counts[np.arange(len(slot)), selected]
        running = np.cumsum(hits)
        hits = self._hits[slot] + running - (running - hits)[_first_of_slot(slot)]
        votes = np.minimum(LOOK_EVERY * (number - self._selecting + 1), self._settings.n)
        law = self._settings.law._asdict()
        decision = sequential.decide(hits, votes, radius=self._radius, alpha=self._alpha, **law)
        self._hits[slot] = hits
        ends = np.flatnonzero((decision != sequential.UNDECIDED) | (votes == self._settings.n) | nan)
        ends = ends[np.unique(slot[ends], return_index=True)[1]]
        self._refuse(slot[ends[nan[ends]]])
        if not len(ends):
            return None
        done = slot[ends]
        positions = self._position[done]
        self._position[done] = -1
        counted = (selected[ends], self._counts0[done], hits[ends], votes[ends], decision[ends])
        return Decisions(positions, self._indices[positions], *counted)

    def _refuse(self, slots: np.ndarray) -> None:
        """Raise a `UserError` for the image in the first of the slots, if there is one."""
        if len(slots):
            raise nan_error(self._indices[self._position[slots[0]]])


def _first_of_slot(slot: np.ndarray) -> np.ndarray:
    """Return for each block `[N]` where the blocks of its slot begin; `slot` is ascending."""
    return np.searchsorted(slot, slot)
