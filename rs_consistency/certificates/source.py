"""The source of answers: the network of a run or of a PyTorch checkpoint, and the images of its dataset."""

import hashlib
import json
import math
import platform
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.certificates.columns import Row
from rs_consistency.certificates.question import Question, answer
from rs_consistency.certificates.record import Record
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.errors import UserError
from rs_consistency.common.progress import duration, size
from rs_consistency.common.version import code_version, package_version
from rs_consistency.devices import parallel
from rs_consistency.models import count_parameters
from rs_consistency.models.inference import for_inference
from rs_consistency.models.torch_checkpoints import ARCHITECTURES, from_torch, read_torch_checkpoint, with_input_layer
from rs_consistency.smoothing.one_function import program_of
from rs_consistency.smoothing.speed import measure_votes
from rs_consistency.smoothing.voter import ApplyFn
from rs_consistency.training import runs
from rs_consistency.training.checkpoints import digest
from rs_consistency.training.config import PLACE_KEYS, flatten
from rs_consistency.training.step import make_model

_VALUES_AT_ONCE = 2**28  # pixel values of the images that are read at once: 1,783 of 224 x 224 x 3
_FOLDERS = ("catrs.teacher", "init_from")  # in a configuration: their names alone, since folders move
_PACKAGES = ("rs-consistency", "jax", "jaxlib", "flax", "numpy", "scipy")  # whose versions are recorded


@dataclass(frozen=True)
class Source:
    """A network ready for inference, and the images to ask it about; from `from_run` or `from_torch`.

    Attributes:
      config: configuration of the run, or the one named beside a PyTorch checkpoint.
      split: images of the dataset.
      devices: devices that share the work.
      step: step of the run's checkpoint; None for a PyTorch checkpoint.
      apply_fn: (variables, `[N, H, W, C]`) -> logits `[N, K]`.
      variables: first argument of `apply_fn`.
      parameters: number of the network's parameters.
      binding: model and data, on which answers depend beside the question; for the record.
    """

    config: ConfigDict
    split: data.OpenSplit
    devices: Sequence[jax.Device]
    step: int | None
    apply_fn: ApplyFn
    variables: dict[str, Any]
    parameters: int
    binding: dict[str, Any]

    @classmethod
    def from_run(cls, workdir: Path, config: ConfigDict, *, devices: Sequence[jax.Device], **places: str) -> Self:
        """Open the images of a run's dataset, and read its newest readable checkpoint.

        Args:
          workdir: folder of the run.
          config: configuration of the run; its dtype, in which the network computes, need not be that of the training.
          devices: devices that share the work.
          **places: `split`, train or test; `data_dir`, folder of the prepared dataset, and `cache_dir`, folder of
            decoded images, both empty for the folder in the configuration.

        Raises:
          UserError: for a folder without a run or a readable checkpoint, or images that cannot be read.
        """
        images, binding = _open_images(config, **places)
        run = runs.restore(workdir, devices)._replace(config=config)
        binding |= {"checkpoint_step": run.step, "parameter_digest": digest(run.variables)}
        return cls(config, images, devices, run.step, *run.classifier(), count_parameters(run.variables), binding)

    @classmethod
    def from_torch(
        cls, checkpoint: Path, config: ConfigDict, *, input_layer: str, devices: Sequence[jax.Device], **places: str
    ) -> Self:
        """Open the images of a dataset, and read a PyTorch checkpoint.

        `config` gives model, dtype and dataset; `input_layer`, one of `torch_checkpoints.INPUT_LAYERS`, stands in front
        of the model. The other arguments are as for `from_run`.

        Raises:
          UserError: for a file that cannot be read or holds another model, or images that cannot be read.
        """
        images, binding = _open_images(config, **places)
        variables = _torch_variables(checkpoint, config, input_layer)
        sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        binding |= {"checkpoint_step": None, "parameter_digest": digest(variables)}
        binding |= {"torch_checkpoint_sha256": sha256, "torch_input": input_layer}
        model = with_input_layer(make_model(config), input_layer)
        network = for_inference(model, variables, image_shape=data.dataset_info(config.dataset.name).image_shape)
        return cls(config, images, devices, None, *network, count_parameters(variables), binding)

    def answers(self, question: Question, indices: np.ndarray) -> Iterator[list[Row]]:
        """Yield the rows of images `[B]`, which are read a part at a time."""
        for part in self._parts(indices):
            images, labels = self.split.read(part)
            yield from answer(question, self.apply_fn, self.variables, images, part, labels, devices=self.devices)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Return the true classes `[B]` of images `[B]`, which are not decoded."""
        return self.split.read_labels(indices)

    def check_config(self, record: Record) -> None:
        """Raise a `UserError` where a record names a setting of the training that is not the one here.

        Places of the training may differ. A record of an earlier version may lack settings.
        """
        mine = flatten(json.loads(json.dumps(self._config(record.settings.sigma))))
        for part in (record.content, *record.content.get("shards", [])):
            named = flatten(part.get("config") or {})
            for key in sorted((named.keys() & mine.keys()) - PLACE_KEYS):
                named_here, here = (
                    Path(str(value)).name if key in _FOLDERS else value for value in (named[key], mine[key])
                )
                if named_here != here:
                    raise UserError(
                        f"{record.path} names another training (config.{key}: {named_here!r} -> {here!r}); give the"
                        " workdir that it names, or restore it from a copy"
                    )

    def _config(self, sigma: float) -> dict[str, Any]:
        """Return the configuration as far as it is known, for a record of votes at a sigma."""
        config = self.config.to_dict()
        if self.step is None:
            return {"model": config["model"], "dataset": {"name": config["dataset"]["name"]}, "sigma": sigma}
        return config

    def _parts(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        at_once = max(1, _VALUES_AT_ONCE // math.prod(data.dataset_info(self.config.dataset.name).image_shape))
        return (indices[first : first + at_once] for first in range(0, len(indices), at_once))

    def about(self, question: Question) -> dict[str, Any]:
        """Return the origin of answers to a question, for the record: device, versions, code, program, configuration.

        A configuration beside a PyTorch checkpoint is recorded only as far as it was used, with the sigma of the votes:
        how that network was trained is not known.
        """
        votes = question.votes
        voter = votes.voter(self.apply_fn, self.devices[0].platform)
        return {
            "device": parallel.describe(self.devices),
            "versions": {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}},
            **code_version(),
            "program": program_of(
                voter, self.variables, votes.image_shape, rows=question.rows_per_device, devices=self.devices
            ),
            "sampler_error": votes.law.slack,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self._config(votes.sigma),
        }


def plan(source: Source, question: Question, selection: Selection, output: Path, *, answered: Collection[int]) -> str:
    """Return the plan of a certification as text, with its measured time; write nothing but caches.

    The file `output` holds the images with the numbers `answered` already.
    """
    config, votes, (work, at_most, per_image) = source.config, question.votes, question.cost()
    wanted = selection.indices()
    done = len(set(wanted.tolist()) & set(answered))
    images, _ = source.split.read(wanted[:1])
    cost = measure_votes(source.apply_fn, source.variables, images, settings=votes, devices=source.devices)
    seconds = (len(wanted) - done) * per_image / cost.per_second
    return "\n".join(
        [
            f"model: {config.model}, {source.parameters:,} parameters, {config.dtype},"
            f" {'PyTorch checkpoint' if source.step is None else f'step {source.step:,}'}; sigma {votes.sigma:g}",
            f"images: {len(wanted):,} of {len(source.split):,} of {config.dataset.name}, {source.binding['split']}, of"
            f" shape {' x '.join(map(str, images.shape[1:]))}; {done:,} done before",
            f"votes: {work}, in batches of {question.rows_per_device * len(source.devices):,}",
            f"devices: {parallel.describe(source.devices)}, {size(cost.bytes_per_device)} each for a batch",
            f"output: {output}",
            f"time: {'at most ' if at_most else 'about '}{duration(seconds)} at {cost.per_second:,.0f} votes a second",
            "dry run: nothing but caches was written",
        ]
    )


def _open_images(
    config: ConfigDict, split: str, data_dir: str, cache_dir: str
) -> tuple[data.OpenSplit, dict[str, Any]]:
    """Open the images of a dataset; return them, and the part of a binding that data and configuration give."""
    name, dtype = config.dataset.name, config.dtype
    data_dir, cache_dir = data_dir or config.dataset.data_dir, cache_dir or config.dataset.cache_dir
    images = data.open_split(name, split, data_dir=data_dir, cache_dir=cache_dir)
    binding = {"dataset": name, "split": split, "data_digest": images.digest(), "model": config.model, "dtype": dtype}
    return images, binding


def _torch_variables(path: Path, config: ConfigDict, input_layer: str) -> dict[str, Any]:
    """Read the variables of a PyTorch checkpoint; a `UserError` for a model other than the configuration's."""
    checkpoint = read_torch_checkpoint(path)
    expected = ARCHITECTURES.get(config.model)
    if checkpoint.arch and expected and checkpoint.arch != expected:
        model = {arch: name for name, arch in ARCHITECTURES.items()}.get(checkpoint.arch)
        remedy = f"add --config.model={model}" if model else f"it can be one of {', '.join(ARCHITECTURES.values())}"
        raise UserError(f"torch_checkpoint={path} is a {checkpoint.arch}, the configuration a {config.model}; {remedy}")
    settings = {"dataset": config.dataset.name, "input_layer": input_layer, "name": f"torch_checkpoint={path}"}
    return from_torch(checkpoint.tensors, config.model, **settings)
