"""What certify.py asks about each image: a certificate, a decision at one radius, or a prediction."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from rs_consistency.smoothing.certify import conclude, most_of_others
from rs_consistency.smoothing.pool import LOOK_EVERY, check_radius, decide_images
from rs_consistency.smoothing.predict import conclude_prediction
from rs_consistency.smoothing.votes import VoteSettings, count_votes
from rs_consistency.statistics.bounds import BOUNDS, N0

FILES = {CERTIFY.name: "certificates", DECIDE.name: "decisions", PREDICT.name: "predictions"}


class Question(NamedTuple):
    """What is asked about each image; from `make_question`, which checks it.

    Attributes:
      schema: of the file with the answers; its name is the mode.
      votes: settings of the votes; n is the cap of a decision.
      alpha: error probability of one answer.
      bound: one of `bounds.BOUNDS`; None for other modes than certify.
      radius: l2, of a decision; None for other modes.
    """

    schema: Schema
    votes: VoteSettings
    alpha: float
    bound: str | None
    radius: float | None

    def identity(self) -> dict[str, Any]:
        """What of it the answers depend on, for the record; `question_of_record` reads it back."""
        found = {"sigma": self.votes.sigma, "n0": self.votes.n0, "n": self.votes.n, "alpha": self.alpha}
        found |= {"seed": self.votes.seed}
        if self.bound is not None:
            found["bound"] = self.bound
        if self.radius is not None:
            found |= {"radius": self.radius, "look_every": LOOK_EVERY}
        return found


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
    """A checked question about images of a dataset; None stands for a default, and for what a mode has no use for.

    Raises:
      UserError: for the first setting that cannot work, or that the mode has no use for.
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
    """The question that a file answers, from its record.

    Raises:
      UserError: when the record lacks a setting, or holds one that cannot work.
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
    """Yields the rows of some images as soon as they are known, each image once, decisions in the order they end.

    Args:
      question: what is asked.
      apply_fn: (variables, `[N, H, W, C]`) -> logits `[N, K]`.
      variables: passed through.
      images: `[B, H, W, C]`, float32 in [0, 1], or uint8.
      indices: `[B]` image numbers, which address the noise.
      labels: `[B]` true classes.
      devices: that share the work.

    Raises:
      UserError: when the model does not accept the images, does not give K logits, or gives NaN.
    """
    rows = {CERTIFY.name: _certificates, DECIDE.name: _decisions, PREDICT.name: _predictions}[question.schema.name]
    yield from rows(question, apply_fn, variables, images, indices, labels, devices)


def _certificates(
    question: Question, apply_fn: Any, variables: Any, images: Any, indices: Any, labels: Any, devices: Any
) -> Iterator[list[Row]]:
    settings, done, clock = question.votes, 0, _Clock()
    uniform = noise.bound_uniform(settings.seed, indices) if question.bound == "randomized" else None
    for votes in count_votes(apply_fn, variables, images, indices, settings=settings, devices=devices):
        part = slice(done, done + len(votes.counts))
        result = conclude(
            *votes,
            alpha=question.alpha,
            sigma=settings.sigma,
            bound=question.bound,
            uniform=None if uniform is None else uniform[part],
        )
        yield certify_rows(indices[part], labels[part], result, clock.seconds_each(len(votes.counts)))
        done = part.stop


def _decisions(
    question: Question, apply_fn: Any, variables: Any, images: Any, indices: Any, labels: Any, devices: Any
) -> Iterator[list[Row]]:
    clock = _Clock()
    for group in decide_images(
        apply_fn,
        variables,
        images,
        indices,
        settings=question.votes,
        radius=question.radius,
        alpha=question.alpha,
        devices=devices,
    ):
        yield decide_rows(
            group.indices,
            labels[group.positions],
            count0=np.take_along_axis(group.counts0, group.selected[:, None], axis=1)[:, 0],
            count=group.hits,
            votes=group.votes,
            selected=group.selected,
            decision=[WORDS[one] for one in group.decision.tolist()],
            radius=question.radius,
            seconds=clock.seconds_each(len(group.positions)),
        )


def _predictions(
    question: Question, apply_fn: Any, variables: Any, images: Any, indices: Any, labels: Any, devices: Any
) -> Iterator[list[Row]]:
    done, clock = 0, _Clock()
    for votes in count_votes(
        apply_fn,
        variables,
        images,
        indices,
        settings=question.votes,
        devices=devices,
        stream=noise.Stream.PREDICT,
    ):
        part = slice(done, done + len(votes.counts))
        result = conclude_prediction(votes.counts, alpha=question.alpha)
        most = result.counts.argmax(axis=1)
        yield predict_rows(
            indices[part],
            labels[part],
            result.prediction,
            count=result.counts.max(axis=1),
            count_runner_up=most_of_others(result.counts, most),
            p_value=result.p_value,
            seconds=clock.seconds_each(len(votes.counts)),
        )
        done = part.stop


class _Clock:
    """The time that passes between groups of images."""

    def __init__(self) -> None:
        self._before = time.perf_counter()

    def seconds_each(self, images: int) -> float:
        """Since the last call, divided among the images that were done meanwhile."""
        before, self._before = self._before, time.perf_counter()
        return (self._before - before) / images
