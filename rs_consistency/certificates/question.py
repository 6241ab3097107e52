"""The question of certify.py about each image: a certificate, a decision at one radius, a prediction, or an attack."""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rs_consistency import noise
from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, PREDICT, SCHEMAS, Row, Schema
from rs_consistency.certificates.proof import planned_votes, rows_of_counts
from rs_consistency.certificates.record import Settings
from rs_consistency.common.checks import one_of, probability
from rs_consistency.common.errors import UserError
from rs_consistency.data import DatasetInfo
from rs_consistency.smoothing.attack import N_ATTACK, Attacks, attack_images
from rs_consistency.smoothing.pool import LOOK_EVERY, Decisions, check_radius, decide_images, rows_in_blocks
from rs_consistency.smoothing.search import Effort, check_effort
from rs_consistency.smoothing.voter import ApplyFn
from rs_consistency.smoothing.votes import Votes, VoteSettings, count_votes
from rs_consistency.statistics.allocation import RULE, pilot_votes
from rs_consistency.statistics.bounds import BOUNDS, N0, N, most_of_others, share_of
from rs_consistency.statistics.limits import check_attacks, check_certificates, check_decisions, check_predictions
from rs_consistency.statistics.rounded_gaussian import STEPS
from rs_consistency.statistics.samplers import GRID

_VOTES_OF_A_GRADIENT = 4  # in time


class Question(NamedTuple):
    """A question about each image; from `make_question`, which checks it.

    Attributes:
      schema: schema of the file with the answers; its name is the mode.
      votes: settings of the votes; n is the cap of a decision.
      alpha: error probability of one answer.
      bound: one of `bounds.BOUNDS` in mode certify, else None.
      alpha_share: share of alpha for p_A, for the bound two_class, else None.
      tolerance: largest expected loss of radius in mode certify, for fewer votes; None for n votes on every image.
      radius: l2 radius in mode decide, else None.
      effort: of the search in mode attack, else None.
    """

    schema: Schema
    votes: VoteSettings
    alpha: float
    bound: str | None = None
    alpha_share: float | None = None
    tolerance: float | None = None
    radius: float | None = None
    effort: Effort | None = None

    def identity(self) -> dict[str, Any]:
        """Return the settings that the answers depend on, for the record; see `record.Settings`."""
        votes = self.votes
        settings = {"sigma": votes.sigma, "n0": votes.n0, "n": votes.n, "alpha": self.alpha, "seed": votes.seed}
        settings |= {"sampler": votes.sampler, "precision": votes.precision}
        if votes.sampler == GRID:
            settings |= {"grid_steps": STEPS, "image_shape": list(votes.image_shape)}
        if self.bound is not None:
            settings |= {"bound": self.bound, "tolerance": self.tolerance}
        if self.tolerance is not None:
            settings["tolerance_rule"] = RULE
        if self.alpha_share is not None:
            settings["alpha_share"] = self.alpha_share
        if self.radius is not None:
            settings |= {"radius": self.radius, "look_every": LOOK_EVERY}
        if self.effort is not None:
            settings |= self.effort._asdict()
        return settings

    def cost(self) -> tuple[str, bool, int]:
        """Return the work for an image as text, whether it may be less, and the work in votes."""
        n0, n = self.votes.n0, self.votes.n
        if self.effort is not None:
            gradients = math.prod(self.effort)
            text = f"{n:,} on each of some 4 images, {gradients:,} gradients"
            return text, False, 4 * n + _VOTES_OF_A_GRADIENT * gradients
        at_most = self.schema is DECIDE or self.tolerance is not None
        return f"{n0:,} + {'at most ' if at_most else ''}{n:,} an image", at_most, n0 + n

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
    n: Any = None,
    n0: Any = None,
    bound: Any = None,
    alpha_share: Any = None,
    tolerance: Any = None,
    radius: Any = None,
    copies: Any = None,
    steps: Any = None,
    restarts: Any = None,
    **votes: Any,
) -> Question:
    """Return a checked question about the images of a dataset.

    None stands for the default of a setting, and for a setting that the mode does not have. The settings are the
    attributes of `Question`; `votes` are sigma, seed, batch_size, sampler and precision, as for
    `votes.vote_settings`.

    Raises:
      UserError: for the first setting that cannot work, or that the mode does not have.
    """
    one_of("mode", mode, SCHEMAS)
    schema = SCHEMAS[mode]
    efforts = {"copies": copies, "steps": steps, "restarts": restarts}
    certifying = {"bound": bound, "alpha_share": alpha_share, "tolerance": tolerance}
    given = {CERTIFY: certifying, DECIDE: {"radius": radius}, ATTACK: efforts}
    for name, value, wanted in ((*each, mode) for mode, values in given.items() for each in values.items()):
        if value is not None and schema is not wanted:
            raise UserError(f"{name}={value}: mode={mode} has no use for it; leave it out, or use --mode={wanted.name}")
    if schema in (PREDICT, ATTACK) and n0 is not None:
        raise UserError(f"n0={n0}: mode={mode} selects no class with votes of their own; leave it out")
    if schema is DECIDE:
        if radius is None:
            raise UserError("mode=decide needs the radius to decide at: add --radius, such as --radius=0.5")
        radius = check_radius(radius)
    elif schema is CERTIFY:
        bound = BOUNDS[0] if bound is None else bound
        one_of("bound", bound, BOUNDS)
        n0 = pilot_votes(n0, tolerance=tolerance, bound=bound, n=n)
        alpha_share = share_of(alpha_share, bound=bound)
    if schema in (CERTIFY, DECIDE):
        votes |= {"n0": N0 if n0 is None else n0, "least_n0": 1}
    n = (N_ATTACK if schema is ATTACK else N) if n is None else n
    settings = VoteSettings.for_dataset(info, devices=devices, n=n, **votes)
    effort = None
    if schema is ATTACK:
        effort = check_effort(**{name: value for name, value in efforts.items() if value is not None})
    question = Question(schema, settings, probability("alpha", alpha), bound, alpha_share, tolerance, radius, effort)
    _check_can_answer(question)
    return question


def _check_can_answer(question: Question) -> None:
    """Raise a `UserError` for settings that prove nothing about any image."""
    votes, alpha, schema = question.votes, question.alpha, question.schema
    if schema is CERTIFY:
        about = {"bound": question.bound, "alpha_share": question.alpha_share, "slack": votes.law.slack}
        check_certificates(votes.n, alpha=alpha, **about)
    elif schema is DECIDE:
        check_decisions(votes.n, radius=question.radius, alpha=alpha, **votes.law._asdict())
    else:
        (check_attacks if schema is ATTACK else check_predictions)(votes.n, alpha=alpha, slack=votes.law.slack)


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
    settings, recorded = {"settings": question.votes, "devices": devices}, Settings(**question.identity())
    if schema is DECIDE:
        groups = decide_images(*network, **settings, radius=question.radius, alpha=question.alpha)
    elif schema is ATTACK:
        groups = attack_images(*network, **settings, effort=question.effort, alpha=question.alpha)
    else:
        stream = noise.Stream.PREDICT if schema is PREDICT else noise.Stream.CERTIFY
        plan = None if question.tolerance is None else functools.partial(planned_votes, recorded)
        groups = count_votes(*network, **settings, stream=stream, plan=plan)
    done = 0
    before = time.perf_counter()
    for group in groups:
        positions = group.positions if schema is DECIDE else np.arange(done, done + len(group.counts))
        done += len(positions)
        now = time.perf_counter()
        about = {"idx": indices[positions], "label": labels[positions], "time": (now - before) / len(positions)}
        yield rows_of_counts(schema, recorded, about | columns_of_counts(schema, group, labels[positions]))
        before = now


def columns_of_counts(schema: Schema, group: Votes | Decisions | Attacks, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a group's counts, `[G]` each, as `proof.rows_of_counts` takes them; labels are `[G]`."""
    if schema is DECIDE:
        count0 = group.counts0[np.arange(len(group.selected)), group.selected]
        return {"count0": count0, "count": group.hits, "votes": group.votes, "selected": group.selected}
    counts = group.counts
    if schema is ATTACK:
        runner_up, most = np.sort(np.pad(counts, ((0, 0), (1, 0))), axis=1)[:, -2:].T  # a class without votes
        results = {"predict": group.prediction, "adversarial": group.adversarial, "distance": group.distance}
        return results | {"count": most, "count_runner_up": runner_up}
    chosen = (counts if schema is PREDICT else group.counts0).argmax(axis=1)
    rows = np.arange(len(counts))
    columns = {
        "count": counts[rows, chosen],
        "count_runner_up": most_of_others(counts, chosen),
        "count_label": counts[rows, labels],
    }
    if schema is PREDICT:
        return {"predict": chosen, **columns}
    return {"count0": group.counts0.max(axis=1), **columns, "selected": chosen, "votes": counts.sum(axis=1)}
