"""The cells of a table: which runs there are, what they are called, and what in them is not as published."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.certificates.selection import Selection, Shard
from rs_consistency.common.checks import one_of, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.models import MODELS
from rs_consistency.reproduction.published import TABLES, Table, table_of
from rs_consistency.statistics.bounds import ALPHA, BOUNDS, N0, N
from rs_consistency.training.config import PLACE_KEYS, flatten, validate

PUBLISHED_VOTES = {"mode": "certify", "n0": N0, "alpha": ALPHA, "bound": BOUNDS[0]}  # of every certificate
_TEST_IMAGES = {"mnist_subset": 1_000, "cifar100": 10_000, "fashion_mnist": 10_000, "svhn": 26_032} | {
    table.dataset: table.test_images for table in TABLES.values()
}
_TRAIN_IMAGES = {"mnist_subset": 10_000, "imagenet": 1_281_167}
_MOST_TRAIN_IMAGES = 60_000  # of the others, or a little less: 50,000 to 73,000
_NEEDS_TEACHER, _TEACHER_SIGMA = "catrs", 0.25
_FORWARD_PASSES = 3  # that a gradient takes as long as
_OTHER_ORDER = "images picked in the order of tensorflow-datasets instead of the original one"
_HAVE_OPTIONS = ("seed", "sigma", "method", "num_epochs", "dataset.name", "model")


class Cell(NamedTuple):
    """One run: trained once, certified once.

    Attributes:
      table: name of its table.
      method: a name of the config file's published cells.
      sigma: standard deviation of the noise.
      seed: of training and certification.
      lbd: weight of the consistency term, where the table compares weights; None elsewhere.
      overrides: configuration keys that differ from the published cell's, and their values.
      selection: the images that are certified.
      n: votes of an image.
      needs: name of the cell whose training must be finished first; None: of no other.
    """

    table: str
    method: str
    sigma: float
    seed: int
    lbd: float | None
    overrides: Mapping[str, Any]
    selection: Selection
    n: int
    needs: str | None = None

    @property
    def name(self) -> str:
        """Of its workdir, and of its folder in the results."""
        weight = "" if self.lbd is None else f"_lbd{self.lbd:g}"
        return f"{self.method}{weight}_sigma{self.sigma:.2f}_seed{self.seed}"

    def config_argument(self, root: Path) -> str:
        """What `--config=` gets: the file of the published cells, and the cell."""
        return f"{root / 'configs' / table_of(self.table).config}.py:method={self.method},sigma={self.sigma:g}"

    def config(self) -> ConfigDict:
        """The whole configuration, as the training gets it."""
        module = importlib.import_module(f"configs.{table_of(self.table).config}")
        config = module.get_config(f"method={self.method},sigma={self.sigma:g}")
        config.update_from_flattened_dict(dict(self.overrides))
        return config

    def train_arguments(self, root: Path, workdir: Path) -> list[str]:
        """Of train.py."""
        overrides = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return [f"--config={self.config_argument(root)}", *overrides, f"--workdir={workdir}"]

    def certify_arguments(self, workdir: Path) -> list[str]:
        """Of certify.py."""
        images = [f"--skip={self.selection.skip}", f"--max={self.selection.size}"]
        return [f"--workdir={workdir}", *images, f"--n={self.n}", f"--seed={self.seed}"]


class Options(NamedTuple):
    """What a user can choose about a plan; None for what was published.

    Attributes:
      methods: rows of the table; by default those whose deviation over seeds was published, if any were.
      sigmas: columns.
      seeds: how many, from 0 on.
      images: certified, spread evenly over the test set.
      n: votes of an image.
      epochs: the schedules shrink with them.
      dataset: another one, such as mnist_subset.
      model: another one, such as resnet20.
      settings: further configuration keys and their values.
    """

    methods: Sequence[str] | None = None
    sigmas: Sequence[float] | None = None
    seeds: int = 1
    images: int | None = None
    n: int = N
    epochs: int | None = None
    dataset: str | None = None
    model: str | None = None
    settings: Mapping[str, Any] = {}


def make_plan(table_name: str, options: Options, *, workdir: Path) -> list[Cell]:
    """All cells of a table in the order they are to be run: the first seed of every cell, then the next.

    Args:
      table_name: a key of `published.TABLES`.
      options: what to run of it, and how.
      workdir: where the cells' workdirs are: CAT-RS needs that of its teacher.

    Raises:
      UserError: for an option that cannot work, or cells of which no published settings are known.
    """
    table = table_of(table_name)
    module = importlib.import_module(f"configs.{table.config}")
    settings = module.PUBLISHED
    seeds = range(whole_number("seeds", options.seeds, at_least=1))
    chosen = _chosen(table_name, table, settings, options)
    overrides = _overrides(table, options) | _checked(options.settings, flatten(module.get_config()), table_name)
    selection = _selection(table, options)
    whole_number("n", options.n, at_least=1)
    cells = []
    for seed in seeds:
        for method, sigma, lbd in chosen:
            cell = Cell(table_name, method, sigma, seed, lbd, dict(overrides), selection, options.n)
            if method == _NEEDS_TEACHER:
                teacher = Cell(
                    table_name, "gaussian", _TEACHER_SIGMA, seed, None, dict(overrides), selection, options.n
                )
                if teacher.name not in {other.name for other in cells}:
                    cells.append(_settled(teacher))
                cell.overrides["catrs.teacher"] = str(workdir / teacher.name)
                cell = cell._replace(needs=teacher.name)
            if cell.name not in {other.name for other in cells}:
                cells.append(_settled(cell))
    for cell in cells:
        validate(cell.config(), num_devices=1)
    return cells


def share_of(cells: list[Cell], shard: Shard | None) -> list[Cell]:
    """The cells of one of several machines, in the order of the plan.

    Shares take about as long, by `cost`: the longest first, each to the share that has least. A cell stays with the one
    that it needs. Every machine finds the same shares.
    """
    if shard is None:
        return cells
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.needs or cell.name, []).append(cell)
    loads, share = [0.0] * shard.count, set()
    for group in sorted(groups.values(), key=lambda group: -sum(map(cost, group))):
        lightest = loads.index(min(loads))
        loads[lightest] += sum(map(cost, group))
        if lightest == shard.index - 1:
            share.update(cell.name for cell in group)
    return [cell for cell in cells if cell.name in share]


def cost(cell: Cell) -> float:
    """How long a cell takes, roughly: in images that pass through the model forward."""
    config = cell.config()
    images = _TRAIN_IMAGES.get(config.dataset.name, _MOST_TRAIN_IMAGES) * config.num_noise * (1 + attack_steps(config))
    return config.num_epochs * images * _FORWARD_PASSES + cell.selection.size * votes_of(cell)


def votes_of(cell: Cell) -> int:
    """On each of a cell's images, those that choose the class among them."""
    return PUBLISHED_VOTES["n0"] + cell.n


def attack_steps(config: ConfigDict) -> int:
    """Of the method's attack in a training step; 0 where it has none."""
    return config.get(config.method, {}).get("num_steps", 0)


def deviations(cell: Cell) -> list[str]:
    """In what a cell's settings differ from the published ones, a phrase each.

    Where it is computed is none of it: no folder or number of devices is named. Another model or dataset is, as
    `model resnet20` and `dataset.name svhn`, and other than the published number of images as `500 of 10,000 images`.
    """
    table, published = table_of(cell.table), flatten(cell._replace(overrides={}).config())
    own = ("seed", "consistency.lbd" if cell.lbd is not None else "", "catrs.teacher")
    found = [
        f"{key} {Path(value).name if key == 'init_from' else value}"
        for key, value in cell.overrides.items()
        if key not in own and key not in PLACE_KEYS and value != published.get(key)
    ]
    size, split_size = cell.selection.size, cell.selection.split_size
    if size != min(table.images, split_size):
        found.append(f"{size:,} of {split_size:,} images")
    if not table.same_images and cell.selection.size < table.test_images:
        found.append(_OTHER_ORDER)
    if cell.n != N:
        found.append(f"n {cell.n:,}")
    return found


def is_about_images(deviation: str) -> bool:
    """Whether a phrase of `deviations` says no more than how many images were certified."""
    return re.fullmatch("[0-9,]+ of [0-9,]+ images", deviation) is not None


def not_available(table_name: str) -> str:
    """A line on the published cells that cannot be run; empty where there are none."""
    table = table_of(table_name)
    settings = importlib.import_module(f"configs.{table.config}").PUBLISHED
    missing: dict[str, list[str]] = {}
    for method, sigma in table.cells:
        if sigma not in settings.get(method, {}):
            missing.setdefault(method, []).append(f"{sigma:g}")
    cells = "; ".join(f"{method} at sigma {', '.join(sigmas)}" for method, sigmas in missing.items())
    return f"published without settings, so not run here: {cells}" if cells else ""


def _chosen(
    table_name: str, table: Table, settings: Mapping[str, Any], options: Options
) -> list[tuple[str, float, float | None]]:
    """Method, sigma and weight of the cells, for one seed."""
    if table.lbds:
        for name, value in (("methods", options.methods), ("sigmas", options.sigmas)):
            if value is not None:
                given = ",".join(map(str, value))
                raise UserError(f"{name}={given}: table={table_name} compares values of lbd; leave {name} out")
        return [("consistency", table.sigmas[0], lbd) for lbd in table.lbds]
    known = [method for method in dict.fromkeys(method for method, _ in table.cells) if method in settings]
    reported = [
        method for method in known if any(table.cells[key].deviation for key in table.cells if key[0] == method)
    ]
    methods, sigmas = options.methods or reported or known, options.sigmas or table.sigmas
    for method in methods:
        one_of("methods", method, known)
    for sigma in sigmas:
        if sigma not in table.sigmas:
            raise UserError(f"sigmas={sigma:g}: table={table_name} has {', '.join(map(str, table.sigmas))}")
    chosen = [(method, sigma, None) for sigma in sigmas for method in methods if sigma in settings[method]]
    if not chosen:
        raise UserError(f"methods={','.join(methods)}: nothing of it is published for sigma {sigmas}; choose others")
    return chosen


def _overrides(table: Table, options: Options) -> dict[str, Any]:
    """What all cells of a plan override."""
    found: dict[str, Any] = {}
    if options.dataset is not None and options.dataset != table.dataset:
        info, published = data.dataset_info(options.dataset), data.dataset_info(table.dataset)
        if (info.image_shape, info.num_classes) != (published.image_shape, published.num_classes):
            raise UserError(f"dataset={options.dataset} has other images or classes than {table.dataset}; leave it out")
        found["dataset.name"] = options.dataset
    if options.model is not None:
        one_of("model", options.model, MODELS)
        found["model"] = options.model
    if options.epochs is not None and options.epochs != table.epochs:
        found["num_epochs"] = whole_number("epochs", options.epochs, at_least=1)
    return found


def _checked(settings: Mapping[str, Any], known: Mapping[str, Any], table_name: str) -> dict[str, Any]:
    """Further settings as the configuration takes them, which has the known keys and values."""
    found = {}
    for key, value in settings.items():
        named = f"config={key}={value}"
        if key in _HAVE_OPTIONS:
            raise UserError(f"{named}: this key has an option of its own, or is the cell's; reproduce.py --help")
        if key == "catrs.teacher":
            raise UserError(f"{named}: the plan trains the teacher itself; leave it out")
        if key == "consistency.lbd" and table_of(table_name).lbds:
            raise UserError(f"{named}: table={table_name} compares values of it; leave it out")
        if key not in known:
            raise UserError(f"{named}: there is no such key; configs/default.py names every key")
        kind = type(known[key])
        if kind is str or (kind is float and type(value) is int):
            value = kind(value)
        if type(value) is not kind:
            kinds = {int: "a whole number", float: "a number", bool: "True or False"}
            raise UserError(f"{named}: use {kinds[kind]}, such as {known[key]}")
        # By its absolute path, as train.py writes it down.
        found[key] = str(Path(value).expanduser().resolve()) if key == "init_from" and value else value
    return found


def _selection(table: Table, options: Options) -> Selection:
    """Every so-manyth image of the test set: a sample that is spread evenly over it.

    Raises:
      UserError: for a number of images that no step between them gives; it names the nearest ones.
    """
    total = _TEST_IMAGES[options.dataset or table.dataset]
    wanted = min(table.images, total)
    if options.images is not None:
        wanted = whole_number("images", options.images, at_least=1, at_most=total)
    skip = -(-total // wanted)
    size = -(-total // skip)  # the most that are no more than wanted
    if size != wanted and options.images is not None:
        more = -(-total // (skip - 1))
        raise UserError(f"images={wanted}: they are every 2nd, 3rd, ... of {total:,}; use {size} or {more}")
    return Selection(total, skip=skip, most=size)


def _settled(cell: Cell) -> Cell:
    """With the overrides that are the cell's own: seed, weight, and schedules that follow the number of epochs.

    Without those that say what is published anyway.
    """
    published = cell._replace(overrides={}).config()
    own: dict[str, Any] = {"seed": cell.seed} if cell.seed else {}
    if cell.lbd is not None and cell.lbd != published.consistency.lbd:
        own["consistency.lbd"] = cell.lbd
    flat = flatten(published)
    for key in ("optimizer.lr_step_size", f"{published.method}.warmup_epochs"):
        if "num_epochs" in cell.overrides and key in flat and key not in cell.overrides:
            own[key] = max(1, round(flat[key] * cell.overrides["num_epochs"] / published.num_epochs))
    overrides = {**cell.overrides, **own}
    return cell._replace(overrides={key: value for key, value in overrides.items() if value != flat[key]})
