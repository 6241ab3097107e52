"""What certify.py asks: the network of a run or of a PyTorch checkpoint, with the images of its dataset."""

import hashlib
import math
import platform
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.certificates.columns import DECIDE, Row
from rs_consistency.certificates.question import Question, answer
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.checks import one_of
from rs_consistency.common.errors import UserError
from rs_consistency.common.progress import duration, size
from rs_consistency.common.version import code_version, package_version
from rs_consistency.devices import parallel
from rs_consistency.models import DTYPES, count_parameters
from rs_consistency.models.inference import for_inference
from rs_consistency.models.torch_checkpoints import (
    ARCHITECTURES,
    INPUT_LAYERS,
    from_torch,
    read_torch_checkpoint,
    with_input_layer,
)
from rs_consistency.smoothing.speed import measure_votes
from rs_consistency.training import runs
from rs_consistency.training.checkpoints import digest
from rs_consistency.training.config import validate
from rs_consistency.training.step import make_model

_VALUES_AT_ONCE = 2**28  # pixel values of the images that are read at once: 1,783 of 224 x 224 x 3


class Classifier:
    """The classifier of a run, or of a PyTorch checkpoint, and the data to ask it about.

    Attributes:
      workdir: of the run; None for a checkpoint.
      config: of the run, or the one that was named beside the checkpoint.
      info: of its dataset.
      devices: that share the work.
      split: after `read`; so are the following.
      step: of the checkpoint; None for one of PyTorch.
      parameters: how many.
      binding: what answers depend on beside the question, for the record.
    """

    def __init__(self, args: Any, *, split: str) -> None:
        """A classifier that is not read yet.

        Args:
          args: of certify.py.
          split: train or test.

        Raises:
          UserError: for a workdir, configuration or setting that cannot be.
        """
        self.workdir = args.workdir and args.workdir.expanduser()
        self.config = runs.read_config(self.workdir) if self.workdir else _named_config(args.config)
        if args.dtype is not None:
            one_of("dtype", args.dtype, DTYPES)
            self.config.dtype = args.dtype
        self._input_layer = args.torch_input or "normalize"  # of a PyTorch checkpoint
        one_of("torch_input", self._input_layer, INPUT_LAYERS)
        self.info = data.dataset_info(self.config.dataset.name)
        self.devices = parallel.choose_devices(args.num_devices)
        self._args, self._split = args, split

    def read(self) -> None:
        """Reads checkpoint and data; separate, since whatever can be wrong with the settings is told first."""
        places, args = self.config.dataset, self._args
        self.split = data.open_split(
            places.name,
            self._split,
            data_dir=args.data_dir or places.data_dir,
            cache_dir=args.cache_dir or places.cache_dir,
        )
        if self.workdir:
            run = runs.restore(self.workdir, self.devices)
            self.step, variables, origin = run.step, run.variables, {}
        else:
            self.step = None
            variables, origin = _of_torch(args.torch_checkpoint.expanduser(), self.config, self._input_layer)
        self.parameters = count_parameters(variables)
        self.binding = {
            "dataset": places.name,
            "split": self._split,
            "data_digest": self.split.digest(),
            "model": self.config.model,
            "dtype": self.config.dtype,
            "checkpoint_step": self.step,
            "parameter_digest": digest(variables),
            **origin,
        }
        model = make_model(self.config)
        if not self.workdir:
            model = with_input_layer(model, self._input_layer)
        self._apply_fn, self._variables = for_inference(model, variables, image_shape=self.info.image_shape)

    def answers(self, question: Question, indices: np.ndarray) -> Iterator[list[Row]]:
        """Rows about the images, which are read a part at a time."""
        at_once = max(1, _VALUES_AT_ONCE // math.prod(self.info.image_shape))
        for first in range(0, len(indices), at_once):
            part = indices[first : first + at_once]
            images, labels = self.split.read(part)
            yield from answer(question, self._apply_fn, self._variables, images, part, labels, devices=self.devices)

    def about(self, sigma: float) -> dict[str, Any]:
        """With what answers are made, for the record: device, versions, code, and the configuration.

        Of a configuration that was named beside a PyTorch checkpoint only what was taken from it: how that network
        was trained is not known.

        Args:
          sigma: of the votes.
        """
        names = ("rs-consistency", "jax", "jaxlib", "flax", "numpy", "scipy")
        config = self.config.to_dict()
        if not self.workdir:
            config = {"model": config["model"], "dataset": {"name": config["dataset"]["name"]}, "sigma": sigma}
        return {
            "device": parallel.describe(self.devices),
            "versions": {"python": platform.python_version(), **{name: package_version(name) for name in names}},
            **code_version(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
        }

    def plan(self, question: Question, selection: Selection, output: Path, *, answered: Collection[int]) -> str:
        """What answering would take, for people; `read` comes first. Writes nothing but caches.

        Args:
          question: what is asked.
          selection: about which images.
          output: where the answers would go.
          answered: the images that are in it already.
        """
        wanted = selection.indices()
        done = len(set(wanted.tolist()) & set(answered))
        images, _ = self.split.read(wanted[:1])
        votes = question.votes
        cost = measure_votes(self._apply_fn, self._variables, images, settings=votes, devices=self.devices)
        seconds = (len(wanted) - done) * (votes.n0 + votes.n) / cost.per_second
        return "\n".join(
            [
                f"model: {self.config.model}, {self.parameters:,} parameters, {self.config.dtype},"
                f" {'PyTorch checkpoint' if self.step is None else f'step {self.step:,}'}; sigma {votes.sigma:g}",
                f"images: {len(wanted):,} of {len(self.split):,} of {self.config.dataset.name}, {self._split}, of shape"
                f" {' x '.join(map(str, images.shape[1:]))}; {done:,} done before",
                f"votes: {votes.n0:,} + {'at most ' if question.schema is DECIDE else ''}{votes.n:,} an image, in"
                f" batches of {votes.batch_size:,}",
                f"devices: {parallel.describe(self.devices)}, {size(cost.bytes_per_device)} each for a batch",
                f"output: {output}",
                f"time: {'at most ' if question.schema is DECIDE else 'about '}{duration(seconds)} at"
                f" {cost.per_second:,.0f} votes a second",
                "dry run: nothing but caches was written",
            ]
        )

    @property
    def platform(self) -> str:
        """Of the devices: cpu, gpu or tpu."""
        return self.devices[0].platform


def names_sigma(arguments: Sequence[str]) -> bool:
    """Whether the words that name a configuration name sigma, too: by a cell, or by its key."""
    words = [word.partition("=") for word in arguments]
    cells = [value.partition(":")[2] for name, _, value in words if name == "--config"]
    return any(name == "--config.sigma" for name, _, _ in words) or any("sigma=" in cell for cell in cells)


def _named_config(arguments: Sequence[str]) -> ConfigDict:
    """The configuration that --config and --config.KEY=VALUE name: model, dataset and sigma of a PyTorch checkpoint."""
    from rs_consistency.cli.train import parse

    config = parse(list(arguments)).config
    config.method = "gaussian"  # how it was trained does not matter, and what another method lacks is not missed
    validate(config, num_devices=1)
    return config


def _of_torch(path: Path, config: ConfigDict, input_layer: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The variables of a PyTorch checkpoint; what identifies its file, and what stood in front of its model."""
    checkpoint = read_torch_checkpoint(path)
    expected = ARCHITECTURES.get(config.model)
    if checkpoint.arch and expected and checkpoint.arch != expected:
        named = {arch: name for name, arch in ARCHITECTURES.items()}.get(checkpoint.arch)
        remedy = f"add --config.model={named}" if named else f"it can be one of {', '.join(ARCHITECTURES.values())}"
        raise UserError(f"torch_checkpoint={path} is a {checkpoint.arch}, the configuration a {config.model}; {remedy}")
    name = f"torch_checkpoint={path}"
    variables = from_torch(
        checkpoint.tensors, config.model, dataset=config.dataset.name, input_layer=input_layer, name=name
    )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return variables, {"torch_checkpoint_sha256": sha256, "torch_input": input_layer}
