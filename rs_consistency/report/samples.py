"""The answers of a run's network for a report: logits of clean and noisy images, and votes on some images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import data, noise
from rs_consistency.common.errors import UserError
from rs_consistency.common.progress import progress_bar
from rs_consistency.devices.parallel import choose_devices
from rs_consistency.models import DTYPES
from rs_consistency.report.contents import Subject
from rs_consistency.smoothing.voter import Voter, nan_error, pixels, to_float
from rs_consistency.smoothing.votes import VoteSettings, count_votes
from rs_consistency.statistics.samplers import FLOAT
from rs_consistency.training import runs
from rs_consistency.training.checkpoints import digest

VOTES = 256  # on an image of the strip
_BATCH = 128
_MOST_FOR_MARGINS = 500  # images


class Samples(NamedTuple):
    """The answers of a network about images of its certificate file.

    Attributes:
      sigma: standard deviation of the noise.
      clean_margins: `[N]`, logit of the true class minus the largest other logit, for images without noise.
      noisy_margins: `[M, N]`, the same for M noisy copies of each image.
      shown: `[S]`, numbers of the images in the strip, the least robust first.
      least: number of them that are the least robust; the others are the most robust.
      images: `[S, H, W, C]` float32 in [0, 1], the images in the strip.
      labels: `[S]`.
      predictions: `[S]`, certified classes, -1 for abstention.
      radii: `[S]`, certified.
      copies: `[S, M, H, W, C]`, noisy copies.
      classes: `[S, M]`, the network's class of each copy.
      votes: `[S, K]` of `VOTES` noisy copies, the M copies among them: not the votes of the certificate.
    """

    sigma: float
    clean_margins: np.ndarray
    noisy_margins: np.ndarray
    shown: np.ndarray
    least: int
    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    radii: np.ndarray
    copies: np.ndarray
    classes: np.ndarray
    votes: np.ndarray

    def within(self) -> float:
        """Return the standard deviation of the margin among copies of an image, as root mean square over images."""
        return float(np.sqrt(self.noisy_margins.var(axis=0, ddof=1).mean()))


def open_images(subject: Subject, *, data_dir: str = "") -> data.OpenSplit:
    """Open the dataset that a file certifies.

    The folder of the prepared dataset is `data_dir`, or, if that is empty, the folder that the file's run names.

    Raises:
      UserError: when the file's record does not name the dataset, or the dataset is missing or has another content.
    """
    name, split, wanted = (str(subject.record.get(key, "")) for key in ("dataset", "split", "data_digest"))
    if not (name and split and wanted):
        raise UserError(f"{subject.path} has no record of certify.py that names its images")
    found = data.open_split(
        name,
        split,
        data_dir=data_dir or str(subject.setting("dataset.data_dir") or ""),
        cache_dir=str(subject.setting("dataset.cache_dir") or ""),
    )
    if found.digest() != wanted:
        raise UserError(f"{name} ({split}) is not the data that {subject.path} is of")
    return found


def read_images(split: data.OpenSplit, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read images `[B, H, W, C]` float32 in [0, 1] and labels `[B]` by number."""
    images, labels = split.read(indices)
    return to_float(images), labels


def ask(subject: Subject, split: data.OpenSplit, *, images: int = 5, copies: int = 4) -> Samples:
    """Restore the network that a file certifies and return its answers: a function of the network and the file.

    The margins are those of up to 500 images, spread over the file. The noise is that of `Stream.REPORT`, which no
    other program draws, under the seed of the file, addressed by image and copy. The strip's votes use the same noise.

    Args:
      subject: the file.
      split: from `open_images`.
      images: number of least and of most robust images in the strip.
      copies: M, noisy copies of each image, at least 2.

    Raises:
      UserError: when there is no run around the file, or the run has no checkpoint, or that of another network.
    """
    record, table = subject.record, subject.certificates
    devices = choose_devices(1)
    info = data.dataset_info(record["dataset"])
    question = VoteSettings.for_dataset(
        info,
        sigma=record.get("sigma"),
        n=VOTES,
        seed=record.get("seed"),
        sampler=record.get("sampler", FLOAT),
        precision=record.get("precision", "default"),
        devices=devices,
    )
    apply_fn, variables = _network(subject, devices)
    look = _look(question.voter(apply_fn, devices[0].platform), variables, question)
    spread = np.unique(np.linspace(0, len(table.idx) - 1, min(len(table.idx), _MOST_FOR_MARGINS)).astype(int))
    least, most = _extremes(np.where(table.correct == 1, table.radius, -table.radius), images)
    chosen = np.concatenate([least, most])
    shown = table.idx[chosen]
    total = (1 + copies) * len(spread) + (copies + VOTES) * len(shown)
    with progress_bar(f"asking {subject.label}", total, brief=True, unit_scale=True) as bar:
        clean, noisy = [], []
        for first in range(0, len(spread), _BATCH):
            indices = table.idx[spread[first : first + _BATCH]]
            pictures, labels = split.read(indices)
            clean.append(margins(look(pictures, indices, None)[1], labels))
            noisy.append([margins(look(pictures, indices, copy)[1], labels) for copy in range(copies)])
            bar.update((1 + copies) * len(indices))
        pictures, labels = split.read(shown)
        drawn, logits = zip(*(look(pictures, shown, copy) for copy in range(copies)), strict=True)
        bar.update(copies * len(shown))
        counts = []
        for group in count_votes(
            apply_fn, variables, pictures, shown, settings=question, devices=devices, stream=noise.Stream.REPORT
        ):
            counts.append(group.counts)
            bar.update(VOTES * len(group.counts))
    return Samples(
        sigma=question.sigma,
        clean_margins=np.concatenate(clean),
        noisy_margins=np.concatenate(noisy, axis=1),
        shown=shown,
        least=len(least),
        images=to_float(pictures),
        labels=labels,
        predictions=table.predict[chosen],
        radii=table.radius[chosen],
        copies=np.stack(drawn, axis=1),
        classes=np.stack([one.argmax(axis=1) for one in logits], axis=1),
        votes=np.concatenate(counts),
    )


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return f_y - max over c != y of f_c, `[N]`, of logits `[N, K]` and labels `[N]`: positive for a right class."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(axis=1)


def _look(
    voter: Voter, variables: Any, settings: VoteSettings
) -> Callable[[np.ndarray, np.ndarray, int | None], tuple[np.ndarray, np.ndarray]]:
    """Return a function (images, their numbers, copy) -> (noisy images, logits); copy None is without noise.

    It takes at most `_BATCH` images, and is compiled once, since all its batches are of that size.
    """
    draws = settings.draws(noise.Stream.REPORT)

    @jax.jit
    def noisy_logits(
        variables: Any, draws: Any, images: jax.Array, indices: jax.Array, copy: jax.Array, is_clean: bool
    ) -> tuple[jax.Array, jax.Array]:
        # The address of an estimating vote, as `votes.count_votes` has it.
        address = indices, jnp.ones_like(indices), jnp.full_like(indices, copy)
        noisy = voter.noisy(images, addresses=address, **draws)
        noisy = jnp.where(is_clean, images.astype(noisy.dtype), noisy)
        return voter.inputs(noisy), voter.logits(variables, noisy)

    def look(images: np.ndarray, indices: np.ndarray, copy: int | None) -> tuple[np.ndarray, np.ndarray]:
        rows = np.minimum(np.arange(_BATCH), len(images) - 1)  # the last image fills the batch
        numbers, is_clean = indices[rows].astype(np.int32), copy is None
        pictures = pixels(images[rows], settings.sampler)
        noisy, logits = noisy_logits(variables, draws, pictures, numbers, np.int32(copy or 0), is_clean)
        noisy, logits = np.asarray(noisy)[: len(images)], np.asarray(logits, np.float32)[: len(images)]
        nan = np.flatnonzero(np.isnan(logits).any(axis=1))
        if len(nan):
            raise nan_error(indices[nan[0]])
        return noisy, logits

    return look


def _network(subject: Subject, devices: list[jax.Device]) -> tuple[Any, Any]:
    """Return the network that a file certifies as an inference function and its variables."""
    record = subject.record
    if subject.workdir is None:
        raise UserError(f"{subject.path} lies in no run's folder")
    run = runs.restore(subject.workdir, devices)
    if digest(run.variables) != record["parameter_digest"]:
        raise UserError(
            f"{subject.path} is of another checkpoint (step {record.get('checkpoint_step')}) than the newest of"
            f" {subject.workdir} (step {run.step})"
        )
    if record.get("dtype") in DTYPES:
        run.config.dtype = record["dtype"]
    return run.classifier()


def _extremes(robustness: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of the least and of the most robust images, each ascending; no image is in both."""
    order = np.argsort(robustness, kind="stable")
    half = min(images, (len(order) + 1) // 2)
    return order[:half], order[half:][-images:]
