"""Published average certified radii, and where they were published.

MNIST: what the authors of consistency regularization reported in their answer to the reviewers: means and standard
deviations over 5 seeds, 10,000 test images, n = 100,000; SmoothMix from its released per-image files. CIFAR-10 and
ImageNet: the papers' tables, one seed.
"""

from typing import NamedTuple

from rs_consistency.errors import UserError


class Published(NamedTuple):
    """A published ACR.

    Attributes:
      acr: mean over the seeds.
      deviation: standard deviation over the seeds; None where it was not published.
      seeds: how many.
    """

    acr: float
    deviation: float | None = None
    seeds: int = 1


class Table(NamedTuple):
    """A published table, and how its cells are run.

    Attributes:
      config: file in `configs/` whose published cells they are.
      dataset: that it trains on.
      test_images: of that dataset.
      images: certified in the published table.
      epochs: published.
      sigmas: columns.
      cells: (method, sigma) -> number; only those with a published setting in the config can be run.
      lbds: weights of the consistency term that are compared, for `tradeoff`; else empty.
    """

    config: str
    dataset: str
    test_images: int
    images: int
    epochs: int
    sigmas: tuple[float, ...]
    cells: dict[tuple[str, float], Published]
    lbds: tuple[float, ...] = ()


_SIGMAS = (0.25, 0.5, 1.0)


def _rows(rows: dict[str, tuple[Published | None, ...]]) -> dict[tuple[str, float], Published]:
    return {
        (method, sigma): value
        for method, values in rows.items()
        for sigma, value in zip(_SIGMAS, values, strict=True)
        if value is not None
    }


def _five(acr: float, deviation: float) -> Published:
    return Published(acr, deviation, 5)


_MNIST = _rows({
    "gaussian": (_five(0.9108, 0.0003), _five(1.5581, 0.0016), _five(1.6184, 0.0021)),
    "stability": (_five(0.9152, 0.0007), _five(1.5719, 0.0028), _five(1.6341, 0.0018)),
    "macer": (_five(0.9201, 0.0006), _five(1.5899, 0.0069), _five(1.5950, 0.0051)),
    "consistency": (_five(0.9300, 0.0004), _five(1.6653, 0.0007), _five(1.7486, 0.0025)),
    "smoothadv": (_five(0.9315, 0.0001), _five(1.6830, 0.0006), _five(1.7706, 0.0019)),
    "smoothadv+consistency": (_five(0.9323, 0.0004), _five(1.6905, 0.0002), _five(1.8087, 0.0022)),
    "smoothmix": (Published(0.933), Published(1.694), Published(1.823)),
})  # fmt: skip

_CIFAR10 = _rows({
    "gaussian": (Published(0.424), Published(0.525), Published(0.511)),
    "stability": (Published(0.420), Published(0.531), Published(0.514)),
    "smoothadv": (Published(0.544), Published(0.684), Published(0.790)),
    "macer": (Published(0.531), Published(0.691), Published(0.744)),
    "consistency": (Published(0.552), Published(0.720), Published(0.756)),
    "smoothadv+consistency": (Published(0.548), Published(0.726), Published(0.816)),
    "smoothmix": (Published(0.553), Published(0.736), None),
    "catrs": (Published(0.562), Published(0.757), Published(0.815)),
})  # fmt: skip

_IMAGENET = _rows({
    "gaussian": (Published(0.477), Published(0.733), Published(0.875)),
    "smoothadv": (Published(0.532), Published(0.825), Published(1.040)),
    "consistency": (None, Published(0.8215), Published(0.9823)),
})  # fmt: skip

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
    "mnist": Table("mnist", "mnist", 10_000, 10_000, 90, _SIGMAS, _MNIST),
    "tradeoff": Table("mnist", "mnist", 10_000, 10_000, 90, (1.0,), {}, tuple(TRADEOFF)),
    "cifar10": Table("cifar10", "cifar10", 10_000, 10_000, 150, _SIGMAS, _CIFAR10),
    "imagenet": Table("imagenet", "imagenet", 50_000, 500, 90, _SIGMAS, _IMAGENET),
}


def table_of(name: str) -> Table:
    """Looks a table up; a `UserError` lists the known ones."""
    if name not in TABLES:
        raise UserError(f"table={name!r} is unknown; use one of {', '.join(TABLES)}")
    return TABLES[name]
