"""Published hyperparameters by method and sigma: the text after the colon of `--config=FILE:TEXT`."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError


def apply_preset(
    config: ConfigDict,
    cell: str,
    *,
    published: Mapping[str, Mapping[float, Mapping[str, Any]]],
    method: str,
    sigma: float,
) -> ConfigDict:
    """Set the keys of one published cell in a config, and return it.

    A cell is `method=NAME,sigma=NUMBER`; a part that is left out is `method` or `sigma`. NAME is one of `published`,
    such as `macer` or `smoothadv+consistency`: name -> sigma -> the keys that the cell sets, `method` among them.

    Raise a `UserError` for a malformed cell, or a pair that was not published; the message lists the published ones.
    """
    chosen = {"method": method, "sigma": str(sigma)}
    given: set[str] = set()
    for part in filter(None, cell.split(",")):
        key, separator, value = part.partition("=")
        if not separator or key not in chosen:
            raise UserError(f"{cell!r} after the config file: write method=NAME,sigma=NUMBER")
        if key in given:
            raise UserError(f"{cell!r} after the config file names {key} twice; leave out one of them")
        given.add(key)
        chosen[key] = value
    try:
        chosen_sigma = float(chosen["sigma"])
    except ValueError:
        raise UserError(f"sigma={chosen['sigma']!r} after the config file is not a number") from None
    if chosen["method"] not in published:
        raise UserError(
            f"method={chosen['method']!r} has no published settings here; use one of {', '.join(published)}, or set"
            " --config.method and its keys yourself, beginning from method=gaussian (configs/default.py names them)"
        )
    cells = published[chosen["method"]]
    if chosen_sigma not in cells:
        raise UserError(
            f"method={chosen['method']} was published for sigma {', '.join(map(str, cells))}, not {chosen_sigma};"
            f" start from one of those and override it with --config.sigma={chosen_sigma}"
        )
    config.sigma = chosen_sigma
    config.update(cells[chosen_sigma])
    return config
