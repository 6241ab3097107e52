"""The cells of a table: the runs, their names, and their deviations from the published settings."""

import importlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.certificates.selection import Selection, Shard
from rs_consistency.common.checks import one_of, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import local_path
from rs_consistency.models import MODELS
from rs_consistency.reproduction.published import Table, table_of
from rs_consistency.statistics.bounds import ALPHA, BOUNDS, N0, N
from rs_consistency.statistics.samplers import FLOAT
from rs_consistency.training.config import PLACE_KEYS, flatten, validate

# Of every certificate. The noise is float32, as in the published code.
PUBLISHED_VOTES = {"mode": "certify", "n0": N0, "alpha": ALPHA, "bound": BOUNDS[0]}
PUBLISHED_VOTES |= {"sampler": FLOAT, "precision": "default"}
_NEEDS_TEACHER, _TEACHER_SIGMA = "catrs", 0.25
_FORWARD_PASSES = 3  # in the time of a gradient
_FOLLOW_EPOCHS = ("lr_step_size", "warmup_epochs", "discard_epoch", "weigh_every")  # the last parts of keys
_HAVE_OPTIONS = ("seed", "sigma", "method", "num_epochs", "dataset.name", "model")


class Cell(NamedTuple):
    """A cell of a table: a run that is trained once and certified once.

    Its `method` is a row of the table, and its `seed` the seed of both programs. `lbd` is the weight of the consistency
    term in a table that compares weights, None in other tables. `overrides` are the configuration keys that differ from
    the published cell's, and `n` the votes of an image. The training of the cell `needs` must be finished first. A
    `teacher` is no cell of the table: only another cell needs it. A single image of it is certified.
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
    teacher: bool = False

    @property
    def name(self) -> str:
        """The name of the cell's workdir, and of its folder in the results."""
        weight = "" if self.lbd is None else f"_lbd{self.lbd:g}"
        return f"{self.method}{weight}{'_teacher' * self.teacher}_sigma{self.sigma:.2f}_seed{self.seed}"

    def config(self) -> ConfigDict:
        """Return the whole configuration, as the training gets it."""
        module = importlib.import_module(f"configs.{table_of(self.table).config}")
        config = module.get_config(f"method={self.method},sigma={self.sigma:g}")
        config.update_from_flattened_dict(dict(self.overrides))
        return config

    def train_arguments(self, root: Path, workdir: Path) -> list[str]:
        """Return the arguments of train.py."""
        overrides = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        file = root / "configs" / f"{table_of(self.table).config}.py"
        return [f"--config={file}:method={self.method},sigma={self.sigma:g}", *overrides, f"--workdir={workdir}"]

    def certify_arguments(self, workdir: Path) -> list[str]:
        """Return the arguments of certify.py."""
        images = [f"--skip={self.selection.skip}", f"--max={self.selection.size}"]
        votes = [f"--{key}={value}" for key, value in PUBLISHED_VOTES.items()]
        return [f"--workdir={workdir}", *images, *votes, f"--n={self.n}", f"--seed={self.seed}"]


class Options(NamedTuple):
    """A user's choices about a plan. None stands for the published setting.

    By default the `methods` are the rows with a published deviation over seeds, or all if none has one. The `seeds` are
    0, 1, ..., and the `images` spread evenly over the test set. The schedules follow the `epochs`. Further keys of all
    configurations are in `settings`.
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
    """Return the cells of a table in the order of their runs: the first seed of every cell, then the next seed.

    The teacher that CAT-RS needs comes before it, with its workdir in the folder `workdir`.
    A `UserError` is raised for an option that cannot work, or cells without published settings.
    """
    table = table_of(table_name)
    module = importlib.import_module(f"configs.{table.config}")
    settings = module.PUBLISHED
    seeds = range(whole_number("seeds", options.seeds, at_least=1))
    chosen = _chosen(table_name, table, settings, options)
    overrides = _overrides(table, options) | _checked(options.settings, flatten(module.get_config()), table_name)
    selection = _selection(table, options)
    whole_number("n", options.n, at_least=1)
    cells: dict[str, Cell] = {}
    for seed, (method, sigma, lbd) in itertools.product(seeds, chosen):
        cell = Cell(table_name, method, sigma, seed, lbd, overrides, selection, options.n)
        if method == _NEEDS_TEACHER:
            teacher = _teacher_of(cell)
            cells.setdefault(teacher.name, teacher)
            path = {"catrs.teacher": str(workdir / teacher.name)}
            cell = cell._replace(overrides=overrides | path, needs=teacher.name)
        cells.setdefault(cell.name, _settled(cell))
    for cell in cells.values():
        validate(cell.config(), num_devices=1)
    return list(cells.values())


def share_of(cells: list[Cell], shard: Shard | None) -> list[Cell]:
    """Return the cells of one of several machines, in the order of the plan.

    The shares take about the same time, by `cost`: each cell, the longest first, goes to the share with the least time.
    A cell stays with the cell that it needs. Every machine computes the same shares.
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
    """Return the rough time of a cell, in forward passes of an image through the model."""
    config = cell.config()
    copies = data.dataset_info(config.dataset.name).train_size * config.num_noise
    passes = copies * (1 + attack_steps(config)) * _FORWARD_PASSES
    return config.num_epochs * passes + cell.selection.size * votes_of(cell)


def votes_of(cell: Cell) -> int:
    """Return the number of votes on each image of a cell: n0 that select the class, and n."""
    return PUBLISHED_VOTES["n0"] + cell.n


def attack_steps(config: ConfigDict) -> int:
    """Return the number of attack steps in a training step, 0 for a method without an attack."""
    return config.get(config.method, {}).get("num_steps", 0)


def deviations(cell: Cell) -> list[str]:
    """Return a phrase for each difference between a cell's settings and the published settings.

    Folders and numbers of devices are no deviations. Examples of phrases: `model resnet20`, `dataset.name svhn`,
    `500 of 10,000 images`.
    """
    table = table_of(cell.table)
    own = {"seed", "catrs.teacher", "consistency.lbd" if table.lbds else "", *PLACE_KEYS}
    found = [
        f"{key} {Path(value).name if key == 'init_from' else value}"
        for key, value in cell.overrides.items()
        if key not in own
    ]
    size, split_size = cell.selection.size, cell.selection.split_size
    published = table.cells.get((cell.method, cell.sigma))
    if size != min((published and published.images) or table.images, split_size):
        found.append(f"{size:,} of {split_size:,} images")
    if not table.same_images and size < split_size:
        found.append("images picked in the order of tensorflow-datasets instead of the original one")
    if cell.n != N:
        found.append(f"n {cell.n:,}")
    return found


def follows_epochs(deviation: str) -> bool:
    """Return whether a phrase of `deviations` is about a method's key that follows the number of epochs."""
    block, _, last = deviation.partition(" ")[0].partition(".")
    return block != "optimizer" and last in _FOLLOW_EPOCHS


def without_images(deviations: Sequence[str]) -> list[str]:
    """Return the phrases of `deviations` but the number of certified images."""
    return [text for text in deviations if not re.fullmatch("[0-9,]+ of [0-9,]+ images", text)]


def not_available(table_name: str) -> str:
    """Return a line that names the published numbers without a cell; empty where there are none."""
    table = table_of(table_name)
    settings = importlib.import_module(f"configs.{table.config}").PUBLISHED
    missing: dict[str, list[str]] = {}
    for method, sigma in table.cells:
        if sigma not in settings.get(method, {}):
            missing.setdefault(method, []).append(f"{sigma:g}")
    cells = "; ".join(f"{method} at sigma {', '.join(sigmas)}" for method, sigmas in missing.items())
    return f"published without a cell in configs/{table.config}.py, so not run here: {cells}" if cells else ""


def chosen_here(table_name: str, methods: Sequence[str]) -> str:
    """Return a line that names the settings of methods that were not published; empty where there are none."""
    found: dict[str, dict[str, None]] = {}
    for (method, sigma), published in table_of(table_name).cells.items():
        if published.chosen and method in methods:
            found.setdefault(published.chosen, {})[f"{sigma:g}"] = None
    text = "; ".join(f"{settings} at sigma {', '.join(sigmas)}" for settings, sigmas in found.items())
    return f"not published, so chosen here: {text}" if text else ""


def _chosen(
    table_name: str, table: Table, settings: Mapping[str, Any], options: Options
) -> list[tuple[str, float, float | None]]:
    """Return method, sigma and weight of the cells of one seed."""
    if table.lbds:
        for name, value in (("methods", options.methods), ("sigmas", options.sigmas)):
            if value is not None:
                given = ",".join(map(str, value))
                raise UserError(f"{name}={given}: table={table_name} compares values of lbd; leave {name} out")
        return [("consistency", table.sigmas[0], lbd) for lbd in table.lbds]
    known = [method for method in dict.fromkeys(method for method, _ in table.cells) if method in settings]
    cells = table.cells.items()
    reported = [
        method for method in known if any(each.reported and each.deviation for (of, _), each in cells if of == method)
    ]
    for name, value in (("methods", options.methods), ("sigmas", options.sigmas)):
        if value is not None and not value:
            raise UserError(f"{name} is empty; name some, or leave it out for all")
    methods, sigmas = options.methods or reported or known, options.sigmas or table.sigmas
    for method in methods:
        one_of("methods", method, known)
    for sigma in sigmas:
        if sigma not in table.sigmas:
            raise UserError(f"sigmas={sigma:g}: table={table_name} has {', '.join(map(str, table.sigmas))}")
    chosen = [(method, sigma, None) for sigma in sigmas for method in methods if sigma in settings[method]]
    if not chosen:
        given = ", ".join(f"{sigma:g}" for sigma in sigmas)
        raise UserError(f"methods={','.join(methods)}: no settings are published for sigma {given}; choose others")
    return chosen


def _overrides(table: Table, options: Options) -> dict[str, Any]:
    """Return the overrides of all cells of a plan."""
    found: dict[str, Any] = {}
    if options.dataset is not None and options.dataset != table.dataset:
        info, published = data.dataset_info(options.dataset), data.dataset_info(table.dataset)
        if (info.image_shape, info.num_classes) != (published.image_shape, published.num_classes):
            raise UserError(f"dataset={options.dataset} has other images or classes than {table.dataset}; leave it out")
        found["dataset.name"] = options.dataset
    if options.model is not None:
        one_of("model", options.model, MODELS)
        found["model"] = options.model
    if options.epochs is not None:
        found["num_epochs"] = whole_number("epochs", options.epochs, at_least=1)
    return found


def _checked(settings: Mapping[str, Any], known: Mapping[str, Any], table_name: str) -> dict[str, Any]:
    """Return further settings, checked and converted to the types of the known keys of the configuration."""
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
        # An absolute path, as train.py records it.
        found[key] = str(local_path(value, key).resolve()) if key == "init_from" and value else value
    return found


def _selection(table: Table, options: Options) -> Selection:
    """Return every kth image of the test set; a `UserError` for a number that no k gives names the nearest numbers."""
    total = data.dataset_info(options.dataset or table.dataset).test_size
    wanted = min(table.images, total)
    if options.images is not None:
        wanted = whole_number("images", options.images, at_least=1, at_most=total)
    skip = -(-total // wanted)
    size = -(-total // skip)  # the most that are no more than wanted
    if size != wanted and options.images is not None:
        more = -(-total // (skip - 1))
        raise UserError(f"images={wanted}: they are every 2nd, 3rd, ... of {total:,}; use {size} or {more}")
    return Selection(total, skip=skip, most=size)


def _teacher_of(cell: Cell) -> Cell:
    """Return the Gaussian cell that a cell learns from: a cell of the table where it has the same schedule."""
    own = cell._replace(method="gaussian", sigma=_TEACHER_SIGMA)
    schedule = {}
    if "num_epochs" not in cell.overrides:  # otherwise the schedules of all cells follow it
        published = flatten(cell._replace(overrides={}).config())
        schedule = {key: published[key] for key in ("num_epochs", "optimizer.lr_step_size")}
    teacher, own = _settled(own._replace(overrides=schedule | cell.overrides)), _settled(own)
    if teacher == own:
        return own
    return teacher._replace(teacher=True, selection=teacher.selection._replace(most=1))


def _settled(cell: Cell) -> Cell:
    """Return the cell with its own overrides: seed, weight, and schedules that follow the number of epochs.

    Overrides that equal the published setting are left out.
    """
    published = flatten(cell._replace(overrides={}).config())
    own: dict[str, Any] = {"seed": cell.seed}
    if cell.lbd is not None:
        own["consistency.lbd"] = cell.lbd
    for key in published:
        block, _, last = key.partition(".")
        follows = last in _FOLLOW_EPOCHS and block in ("optimizer", published["method"])
        if "num_epochs" in cell.overrides and follows and key not in cell.overrides:
            own[key] = max(1, round(published[key] * cell.overrides["num_epochs"] / published["num_epochs"]))
    overrides = {**cell.overrides, **own}
    return cell._replace(overrides={key: value for key, value in overrides.items() if value != published[key]})
