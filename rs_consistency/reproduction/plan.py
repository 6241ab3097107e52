"""The cells of a table: which runs there are, what they are called, and what in them is not as published."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.checks import one_of, whole_number
from rs_consistency.config import flatten
from rs_consistency.errors import UserError
from rs_consistency.models import MODELS
from rs_consistency.reproduction.published import TABLES, Table, table_of
from rs_consistency.shards import Selection, Shard

PUBLISHED_N = 100_000
_TEST_IMAGES = {"mnist_subset": 1_000, "cifar100": 10_000, "fashion_mnist": 10_000, "svhn": 26_032} | {
    table.dataset: table.test_images for table in TABLES.values()
}
_NEEDS_TEACHER, _TEACHER_SIGMA = "catrs", 0.25


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
    n: int = PUBLISHED_N
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
    settings = importlib.import_module(f"configs.{table.config}").PUBLISHED
    seeds = range(whole_number("seeds", options.seeds, at_least=1))
    chosen = _chosen(table_name, table, settings, options)
    overrides, selection = _overrides(table, options), _selection(table, options)
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
    return cells


def share_of(cells: list[Cell], shard: Shard | None) -> list[Cell]:
    """The cells of one of several machines: every count-th."""
    return cells if shard is None else cells[shard.index - 1 :: shard.count]


def deviations(cell: Cell) -> list[str]:
    """In what a cell's settings differ from the published ones, a phrase each."""
    table = table_of(cell.table)
    own = ("seed", "consistency.lbd" if cell.lbd is not None else "", "catrs.teacher")
    found = [f"{key} {value}" for key, value in cell.overrides.items() if key not in own]
    if cell.selection.size != table.images:
        found.append(f"{cell.selection.size:,} of {table.images:,} images")
    if cell.n != PUBLISHED_N:
        found.append(f"n {cell.n:,}")
    return found


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
    return found | dict(options.settings)


def _selection(table: Table, options: Options) -> Selection:
    """Images spread evenly over the test set."""
    total = _TEST_IMAGES[options.dataset or table.dataset]
    images = min(table.images, total) if options.images is None else options.images
    whole_number("images", images, at_least=1, at_most=total)
    return Selection(total, skip=total // images, most=images)


def _settled(cell: Cell) -> Cell:
    """With the overrides that are the cell's own: seed, weight, and schedules that follow the number of epochs."""
    published = cell._replace(overrides={}).config()
    own: dict[str, Any] = {"seed": cell.seed} if cell.seed else {}
    if cell.lbd is not None and cell.lbd != published.consistency.lbd:
        own["consistency.lbd"] = cell.lbd
    flat = flatten(published)
    for key in ("optimizer.lr_step_size", f"{published.method}.warmup_epochs"):
        if "num_epochs" in cell.overrides and key in flat and key not in cell.overrides:
            own[key] = max(1, round(flat[key] * cell.overrides["num_epochs"] / published.num_epochs))
    return cell._replace(overrides={**cell.overrides, **own})
