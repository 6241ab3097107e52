"""Published average certified radii, and where they were published.

MNIST: means and standard deviations over 5 seeds, with 10,000 test images and n = 100,000, which the authors of
consistency regularization reported in their answer to the reviewers. Beside them stands the ACR of the per-image files
that the authors released later, the only source for SmoothMix (5 seeds) and CAT-RS (one seed).

CIFAR-10 and ImageNet: the papers' tables, one seed. The released files of CIFAR-10 are those of CAT-RS's repository,
which hold all 10,000 test images; SmoothMix at sigma 1.0 is a file of Sun et al. (ICML 2025). SmoothAdv's released
files of ImageNet hold 500 images; the papers that report .532 / .825 / 1.040 have the first 427 of them.
Fashion-MNIST: files of CAT-RS's repository, one seed.
"""

from collections.abc import Mapping
from typing import NamedTuple

from rs_consistency.common.errors import UserError


class Published(NamedTuple):
    """A published ACR; None for what was not published.

    Attributes:
      reported: mean over the seeds, in a paper or an answer to reviewers.
      deviation: standard deviation over the seeds.
      seeds: number of seeds.
      released: ACR of the per-image files that the authors released.
      images: number of images behind `acr`; None for that of the table.
      chosen: settings that were not published, and are chosen in the config.
    """

    reported: float | None
    deviation: float | None = None
    seeds: int = 1
    released: float | None = None
    images: int | None = None
    chosen: str = ""

    @property
    def acr(self) -> float:
        """The ACR with which a measured ACR is compared: the reported one, if there is one."""
        return self.released if self.reported is None else self.reported


class Table(NamedTuple):
    """A published table, and how its cells are run.

    Attributes:
      config: file in `configs/` with the settings of the cells.
      images: number of images that were certified, and are certified here.
      cells: (method, sigma) -> number; only cells with published settings in the config can be run.
      lbds: weights of the consistency term that are compared, for `tradeoff`; empty for other tables.
      same_images: whether test images certified here are among the images of the published mean. Not for ImageNet:
        every 100th image in the order of tensorflow-datasets is not every 100th of the original.
      other_models: model -> cells, published beside the table for another model.
    """

    config: str
    dataset: str
    images: int
    sigmas: tuple[float, ...]
    cells: dict[tuple[str, float], Published]
    lbds: tuple[float, ...] = ()
    same_images: bool = True
    other_models: Mapping[str, dict[tuple[str, float], Published]] = {}


_SIGMAS = (0.25, 0.5, 1.0)


def _rows(rows: dict[str, tuple[Published | None, ...]]) -> dict[tuple[str, float], Published]:
    return {
        (method, sigma): value
        for method, values in rows.items()
        for sigma, value in zip(_SIGMAS, values, strict=True)
        if value is not None
    }


def _five(acr: float, deviation: float, released: float) -> Published:
    return Published(acr, deviation, 5, released)


def _released(acr: float, chosen: str = "") -> Published:
    return Published(None, released=acr, chosen=chosen)


def _both(*numbers: tuple[float, float]) -> tuple[Published, ...]:
    return tuple(Published(reported, released=released) for reported, released in numbers)


_MNIST = _rows(
    {
        "gaussian": (_five(0.9108, 0.0003, 0.9108), _five(1.5581, 0.0016, 1.5580), _five(1.6184, 0.0021, 1.6184)),
        "stability": (_five(0.9152, 0.0007, 0.9152), _five(1.5719, 0.0028, 1.5719), _five(1.6341, 0.0018, 1.6341)),
        "macer": (_five(0.9201, 0.0006, 0.9201), _five(1.5899, 0.0069, 1.5899), _five(1.5950, 0.0051, 1.5950)),
        "consistency": (_five(0.9300, 0.0004, 0.9282), _five(1.6653, 0.0007, 1.6548), _five(1.7486, 0.0025, 1.7375)),
        "smoothadv": (_five(0.9315, 0.0001, 0.9322), _five(1.6830, 0.0006, 1.6872), _five(1.7706, 0.0019, 1.7786)),
        "smoothadv+consistency": (
            _five(0.9323, 0.0004, 0.9323),
            _five(1.6905, 0.0002, 1.6957),
            _five(1.8087, 0.0022, 1.8163),
        ),
        # The files with the image itself as the clean side, of seeds 21 to 25. One step gives .9332 / 1.6851 / 1.8212.
        "smoothmix": tuple(
            Published(None, deviation, 5, released)
            for released, deviation in ((0.9317, 0.0002), (1.6932, 0.0007), (1.8185, 0.0016))
        ),
        "catrs": (_released(0.9331), _released(1.6999, "catrs.lbd"), _released(1.8306, "catrs.lbd")),
    }
)

_FROM_MNIST = "hyperparameters (those of MNIST)"
_FASHION_MNIST = _rows(
    {
        method: tuple(_released(acr, "" if method == "gaussian" else _FROM_MNIST) for acr in numbers)
        for method, numbers in {
            "gaussian": (0.6701, 1.0563, 1.3163),
            "stability": (0.6886, 1.1180, 1.3939),
            "macer": (0.7268, 1.1833, 1.5045),
            "consistency": (0.7436, 1.2118, 1.4913),
            "smoothadv": (0.7559, 1.2547, 1.5380),
            "smoothmix": (0.7454, 1.2369, 1.5338),
            "catrs": (0.7566, 1.2741, 1.6068),
        }.items()
    }
)

_CIFAR10 = _rows(
    {
        "gaussian": _both((0.424, 0.4240), (0.525, 0.5251), (0.511, 0.5105)),
        "stability": _both((0.420, 0.4199), (0.531, 0.5312), (0.514, 0.5145)),
        "smoothadv": _both((0.544, 0.5444), (0.684, 0.6841), (0.790, 0.7896)),
        "macer": _both((0.531, 0.5313), (0.691, 0.6910), (0.744, 0.7441)),
        "consistency": _both((0.552, 0.5519), (0.720, 0.7195), (0.756, 0.7563)),
        "smoothadv+consistency": (Published(0.548), Published(0.726), Published(0.816)),
        "smoothmix": (*_both((0.553, 0.5534), (0.736, 0.7356)), _released(0.7877)),
        "catrs": _both((0.562, 0.5616), (0.757, 0.7571), (0.815, 0.8148)),
        "sun": _both((0.564, 0.5642), (0.760, 0.7603), (0.844, 0.8437)),
    }
)

# ResNet-110 is the table's model; these two were published for sigma 0.5 alone.
_CIFAR10_OTHER_MODELS = {
    model: {
        (method, 0.5): Published(acr)
        for method, acr in zip(("gaussian", "stability", "smoothadv", "macer", "consistency"), numbers, strict=True)
    }
    for model, numbers in {
        "resnet20": (0.5242, 0.4992, 0.6924, 0.6607, 0.6864),
        "densenet40": (0.4937, 0.4967, 0.6709, 0.6413, 0.6609),
    }.items()
}

_FEWER = 427  # of the 500 images, the first ones
_IMAGENET = _rows(
    {
        "gaussian": (Published(0.477, images=_FEWER), Published(0.733), Published(0.875)),
        # DDN with 2 steps, epsilon 255; PGD with 1 step, epsilon 255; PGD with 1 step, epsilon 512.
        "smoothadv": tuple(
            Published(reported, released=released, images=_FEWER, chosen=chosen)
            for reported, released, chosen in (
                (0.532, 0.5349, ""),
                (0.825, 0.8491, "smoothadv.warmup_epochs"),
                (1.040, 1.0786, "smoothadv.warmup_epochs"),
            )
        ),
        "consistency": (None, Published(0.8215), Published(0.9823)),
        "catrs": (None, None, Published(1.071, released=1.0715)),
        "sun": _both((0.529, 0.5293), (0.842, 0.8417), (1.043, 1.0425)),
    }
)

# Weight of the consistency term -> (ACR, clean accuracy): MNIST, sigma 1.0, M 2, one seed, released files.
TRADEOFF = {
    1.0: (1.7143, 0.960),
    5.0: (1.7382, 0.950),
    15.0: (1.7312, 0.936),
    20.0: (1.7198, 0.930),
    25.0: (1.2261, 0.732),
    30.0: (0.8456, 0.449),
}

TABLES = {
    "mnist": Table("mnist", "mnist", 10_000, _SIGMAS, _MNIST),
    "tradeoff": Table("mnist", "mnist", 10_000, (1.0,), {}, tuple(TRADEOFF)),
    "fashion_mnist": Table("fashion_mnist", "fashion_mnist", 10_000, _SIGMAS, _FASHION_MNIST),
    "cifar10": Table("cifar10", "cifar10", 10_000, _SIGMAS, _CIFAR10, other_models=_CIFAR10_OTHER_MODELS),
    "imagenet": Table("imagenet", "imagenet", 500, _SIGMAS, _IMAGENET, same_images=False),
}


def table_of(name: str) -> Table:
    """Return a table by name; a `UserError` lists the known names."""
    if name not in TABLES:
        raise UserError(f"table={name!r} is unknown; use one of {', '.join(TABLES)}")
    return TABLES[name]


def published_acr(
    table: Table, method: str, sigma: float, lbd: float | None, changed: Mapping[str, str]
) -> Published | None:
    """Return the published number to compare a measured ACR with, None where there is none.

    `lbd` is the weight of the consistency term in a table that compares weights. `changed` are the settings, by key,
    that deviate from the published ones.
    """
    model = changed.get("model")
    if "dataset.name" in changed:
        return None
    if lbd is not None:
        return _released(TRADEOFF[lbd][0]) if lbd in TRADEOFF and model is None else None
    cells = table.cells if model is None else table.other_models.get(model, {})
    return cells.get((method, sigma))
