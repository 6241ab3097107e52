"""The question of certify.py about each image: a certificate, a decision at one radius, or a prediction."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rs_consistency import noise
from rs_consistency.certificates.columns import CERTIFY, DECIDE, PREDICT, SCHEMAS, Row, Schema
from rs_consistency.certificates.proof import rows_of_counts
from rs_consistency.certificates.record import Settings
from rs_consistency.common.checks import one_of, probability
from rs_consistency.common.errors import UserError
from rs_consistency.data import DatasetInfo
from rs_consistency.smoothing.pool import LOOK_EVERY, Decisions, check_radius, decide_images, rows_in_blocks
from rs_consistency.smoothing.voter import ApplyFn
from rs_consistency.smoothing.votes import Votes, VoteSettings, count_votes
from rs_consistency.statistics.bounds import BOUNDS, N0, most_of_others
from rs_consistency.statistics.rounded_gaussian import STEPS
from rs_consistency.statistics.samplers import GRID

FILES = {CERTIFY.name: "certificates", DECIDE.name: "decisions", PREDICT.name: "predictions"}


class Question(NamedTuple):
    """A question about each image; from `make_question`, which checks it.

    Attributes:
      schema: schema of the file with the answers; its name is the mode.
      votes: settings of the votes; n is the cap of a decision.
      alpha: error probability of one answer.
      bound: one of `bounds.BOUNDS` in mode certify, else None.
      radius: l2 radius in mode decide, else None.
    """

    schema: Schema
    votes: VoteSettings
    alpha: float
    bound: str | None
    radius: float | None

    def identity(self) -> dict[str, Any]:
        """Return the settings that the answers depend on, for the record; see `record.Settings`."""
        votes = self.votes
        settings = {"sigma": votes.sigma, "n0": votes.n0, "n": votes.n, "alpha": self.alpha, "seed": votes.seed}
        settings |= {"sampler": votes.sampler, "precision": votes.precision}
        if votes.sampler == GRID:
            settings |= {"grid_steps": STEPS, "image_shape": list(votes.image_shape)}
        if self.bound is not None:
            settings["bound"] = self.bound
        if self.radius is not None:
            settings |= {"radius": self.radius, "look_every": LOOK_EVERY}
        return settings

    @property
    def rows_per_device(self) -> int:
        """The number of noisy images in a batch on each device."""
        return rows_in_blocks(self.votes) if self.schema is DECIDE else self.votes.rows_per_device


def make_question(
    mode: str,
    *,
    info: DatasetInfo,
    devices: Sequence[jax.Device],
    alpha: Any,
    n0: Any = None,
    bound: Any = None,
    radius: Any = None,
    **votes: Any,
) -> Question:
    """Return a checked question about the images of a dataset.

    None stands for the default of a setting, and for a setting that the mode does not have. The settings are the
    attributes of `Question`; `votes` are sigma, n, seed, batch_size, sampler and precision, as for
    `votes.vote_settings`.

    Raises:
      UserError: for the first setting that cannot work, or that the mode does not have.
    """
    one_of("mode", mode, SCHEMAS)
    schema = SCHEMAS[mode]
    for name, value, wanted in (("bound", bound, CERTIFY), ("radius", radius, DECIDE)):
        if value is not None and schema is not wanted:
            raise UserError(f"{name}={value}: mode={mode} has no use for it; leave it out, or use --mode={wanted.name}")
    if schema is PREDICT and n0 is not None:
        raise UserError(f"n0={n0}: mode={mode} selects no class with votes of their own; leave it out")
    if schema is DECIDE:
        if radius is None:
            raise UserError("mode=decide needs the radius to decide at: add --radius, such as --radius=0.5")
        radius = check_radius(radius)
    elif schema is CERTIFY:
        bound = BOUNDS[0] if bound is None else bound
        one_of("bound", bound, BOUNDS)
    if schema is not PREDICT:
        votes |= {"n0": N0 if n0 is None else n0, "least_n0": 1}
    settings = VoteSettings.for_dataset(info, devices=devices, **votes)
    return Question(schema, settings, probability("alpha", alpha), bound, radius)


def answer(
    question: Question,
    apply_fn: ApplyFn,
    variables: Any,
    images: np.ndarray,
    indices: np.ndarray,
    labels: np.ndarray,
    *,
    devices: Sequence[jax.Device],
) -> Iterator[list[Row]]:
    """Yield the rows of images as soon as they are known, each image once; decisions in the order in which they end.

    The network's answers are about images `[B, H, W, C]` with numbers `indices` `[B]` and true classes `labels` `[B]`;
    the other arguments are as for `votes.count_votes`.

    Raises:
      UserError: for a model that does not accept the images, does not give K logits, or gives NaN.
    """
    schema, network = question.schema, (apply_fn, variables, images, indices)
    settings = {"settings": question.votes, "devices": devices}
    if schema is DECIDE:
        groups = decide_images(*network, **settings, radius=question.radius, alpha=question.alpha)
    else:
        stream = noise.Stream.PREDICT if schema is PREDICT else noise.Stream.CERTIFY
        groups = count_votes(*network, **settings, stream=stream)
    recorded, done = Settings(**question.identity()), 0
    before = time.perf_counter()
    for group in groups:
        positions = group.positions if schema is DECIDE else np.arange(done, done + len(group.counts))
        done += len(positions)
        now = time.perf_counter()
        about = {"idx": indices[positions], "label": labels[positions], "time": (now - before) / len(positions)}
        yield rows_of_counts(schema, recorded, about | columns_of_counts(schema, group))
        before = now


def columns_of_counts(schema: Schema, group: Votes | Decisions) -> dict[str, np.ndarray]:
    """Return the columns of a group's counts, `[G]` each, as `proof.rows_of_counts` takes them."""
    if schema is DECIDE:
        count0 = group.counts0[np.arange(len(group.selected)), group.selected]
        return {"count0": count0, "count": group.hits, "votes": group.votes, "selected": group.selected}
    counts = group.counts
    chosen = (counts if schema is PREDICT else group.counts0).argmax(axis=1)
    count = np.take_along_axis(counts, chosen[:, None], axis=1)[:, 0]
    columns = {"count": count, "count_runner_up": most_of_others(counts, chosen)}
    if schema is PREDICT:
        return {"predict": chosen, **columns}
    return {"count0": group.counts0.max(axis=1), **columns, "selected": chosen}
