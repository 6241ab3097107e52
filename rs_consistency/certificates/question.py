"""The question of certify.py about each image: a certificate, a decision at one radius, or a prediction."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rs_consistency import noise
from rs_consistency.certificates.columns import (
    CERTIFY,
    DECIDE,
    PREDICT,
    SCHEMAS,
    WORDS,
    Row,
    Schema,
    certify_rows,
    decide_rows,
    predict_rows,
)
from rs_consistency.common.checks import one_of, probability
from rs_consistency.common.errors import UserError
from rs_consistency.data import DatasetInfo
from rs_consistency.smoothing.certify import conclude
from rs_consistency.smoothing.pool import LOOK_EVERY, Decisions, check_radius, decide_images
from rs_consistency.smoothing.predict import conclude_prediction
from rs_consistency.smoothing.votes import Votes, VoteSettings, count_votes
from rs_consistency.statistics.bounds import BOUNDS, N0, most_of_others

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
        """Return the settings that the answers depend on, for the record; `question_of_record` reads them back."""
        votes = self.votes
        settings = {"sigma": votes.sigma, "n0": votes.n0, "n": votes.n, "alpha": self.alpha, "seed": votes.seed}
        if self.bound is not None:
            settings["bound"] = self.bound
        if self.radius is not None:
            settings |= {"radius": self.radius, "look_every": LOOK_EVERY}
        return settings


def make_question(
    mode: str,
    *,
    sigma: Any,
    n: Any,
    alpha: Any,
    seed: Any,
    n0: Any = None,
    bound: Any = None,
    radius: Any = None,
    batch_size: Any = None,
    info: DatasetInfo,
    platform: str,
) -> Question:
    """Return a checked question about the images of a dataset.

    None stands for the default of a setting, and for a setting that the mode does not have. The settings are the
    attributes of `Question`, and the arguments of `votes.vote_settings`.

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
    selects = schema is not PREDICT
    votes = VoteSettings.for_dataset(
        info,
        sigma=sigma,
        n=n,
        seed=seed,
        batch_size=batch_size,
        n0=(N0 if n0 is None else n0) if selects else 0,
        least_n0=int(selects),
        platform=platform,
    )
    return Question(schema, votes, probability("alpha", alpha), bound, radius)


def question_of_record(record: Mapping[str, Any], *, info: DatasetInfo, platform: str, batch_size: Any) -> Question:
    """Return the question that a file answers, from its record.

    Raises:
      UserError: for a record that lacks a setting, or holds one that cannot work.
    """
    mode = record.get("mode", CERTIFY.name)
    names = ["sigma", "n", "alpha", "seed"]
    names += {CERTIFY.name: ["n0", "bound"], DECIDE.name: ["n0", "radius"]}.get(mode, [])
    missing = [name for name in names if name not in record]
    if missing:
        raise UserError(f"the record lacks {', '.join(missing)}: how the file was made is not known; certify again")
    settings = {name: record[name] for name in names}
    return make_question(mode, **settings, batch_size=batch_size, info=info, platform=platform)


def answer(
    question: Question,
    apply_fn: Callable[[Any, jax.Array], jax.Array],
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
    network = (apply_fn, variables, images, indices)
    settings = {"settings": question.votes, "devices": devices}
    if question.schema is DECIDE:
        groups = decide_images(*network, **settings, radius=question.radius, alpha=question.alpha)
        placed = ((group.positions, group) for group in groups)
    else:
        stream = noise.Stream.PREDICT if question.schema is PREDICT else noise.Stream.CERTIFY
        placed = _in_order(count_votes(*network, **settings, stream=stream))
    rows = {CERTIFY.name: _certified, DECIDE.name: _decided, PREDICT.name: _predicted}[question.schema.name]
    before = time.perf_counter()
    for positions, group in placed:
        now = time.perf_counter()
        yield rows(question, group, indices[positions], labels[positions], (now - before) / len(positions))
        before = now


def _in_order(groups: Iterable[Votes]) -> Iterator[tuple[np.ndarray, Votes]]:
    """Yield the positions of the images of each group, and the group."""
    done = 0
    for votes in groups:
        yield np.arange(done, done + len(votes.counts)), votes
        done += len(votes.counts)


def _certified(question: Question, votes: Votes, indices: np.ndarray, labels: np.ndarray, seconds: float) -> list[Row]:
    uniform = noise.bound_uniform(question.votes.seed, indices) if question.bound == "randomized" else None
    result = conclude(*votes, alpha=question.alpha, sigma=question.votes.sigma, bound=question.bound, uniform=uniform)
    return certify_rows(indices, labels, result, seconds)


def _decided(
    question: Question, group: Decisions, indices: np.ndarray, labels: np.ndarray, seconds: float
) -> list[Row]:
    return decide_rows(
        indices,
        labels,
        count0=group.counts0[np.arange(len(indices)), group.selected],
        count=group.hits,
        votes=group.votes,
        selected=group.selected,
        decision=[WORDS[decision] for decision in group.decision.tolist()],
        radius=question.radius,
        seconds=seconds,
    )


def _predicted(question: Question, votes: Votes, indices: np.ndarray, labels: np.ndarray, seconds: float) -> list[Row]:
    result = conclude_prediction(votes.counts, alpha=question.alpha)
    return predict_rows(
        indices,
        labels,
        result.prediction,
        count=result.counts.max(axis=1),
        count_runner_up=most_of_others(result.counts, result.counts.argmax(axis=1)),
        p_value=result.p_value,
        seconds=seconds,
    )
