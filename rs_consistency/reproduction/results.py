"""The kept files of a finished cell: certificates, settings, metrics and origin, in a few hundred kilobytes.

`RESULTS/TABLE/CELL/` holds `certificates.tsv.gz` and `certificates.json` (as certify.py wrote them), `config.json`,
`metrics.jsonl` and `run.json`. They name no folders of this machine.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rs_consistency.certificates.columns import seconds_of
from rs_consistency.certificates.proof import load
from rs_consistency.certificates.read import Certificates, read_table, standing
from rs_consistency.certificates.record import content_beside
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.checks import number_above, number_from, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json, replace_atomically
from rs_consistency.reproduction.plan import PUBLISHED_VOTES, Cell, deviations, without_images
from rs_consistency.reproduction.state import CERTIFICATES, calls_of
from rs_consistency.training.config import flatten
from rs_consistency.training.metrics import METRICS_FILE, read_lines
from rs_consistency.training.runs import CONFIG_FILE

PACKED, RECORD = "certificates.tsv.gz", "certificates.json"
RUN_FILE = "run.json"
NOT_RECORDED = "not recorded"  # by earlier versions
# Key of a record of certificates -> key of the configuration with the same value.
_OF_CONFIG = {"dataset": "dataset.name", "model": "model", "dtype": "dtype", "sigma": "sigma"}


class Result(NamedTuple):
    """A finished cell: its settings, its certificates, and `made`, the content of `run.json`.

    The name is that of its folder. The `data_digest` of the images is None where it is not recorded.
    """

    name: str
    method: str
    sigma: float
    seed: int
    lbd: float | None
    epochs: int
    deviations: tuple[str, ...]
    made: dict[str, Any]
    certificates: Certificates
    data_digest: str | None = None


def check_keepable(cells: Sequence[Cell], results: Path) -> None:
    """Raise a `UserError` for the first cell that the results hold with other settings, or with images it has not."""
    for cell in cells:
        path = results / cell.table / cell.name / RUN_FILE
        if not path.exists():
            continue
        kept, wanted = read_json(path), _identity(cell)
        if _has_all_images(cell, kept):
            wanted["images"] = kept["images"]
        if kept.get("images") == wanted["images"] and isinstance(kept.get("deviations"), list):
            for settings in (wanted, kept):
                settings["deviations"] = without_images(settings["deviations"])
        differing = [f"{key}: {kept.get(key)} -> {value}" for key, value in wanted.items() if kept.get(key) != value]
        if differing:
            raise UserError(
                f"results={results} holds {cell.name} with other settings ({'; '.join(differing)}); choose another"
                " --results"
            )


def keep(cell: Cell, workdir: Path, results: Path) -> None:
    """Copy the kept files of a finished cell into the results, and replace those of an earlier run of the cell.

    `run.json` is removed first and written last: where it exists, the other files belong to it. A `UserError` is raised
    when the results hold the cell with other settings, or a file of the workdir is damaged.
    """
    check_keepable([cell], results)
    folder = results / cell.table / cell.name
    try:
        files = _files(cell, workdir)
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{workdir} lacks {error} of a finished run; move it away, and run again") from None
    if all((folder / name).is_file() and (folder / name).read_bytes() == files[name] for name in files):
        return  # others may be reading it
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).unlink(missing_ok=True)
    for name, content in files.items():
        with replace_atomically(folder / name) as temporary:
            temporary.write_bytes(content)


def _files(cell: Cell, workdir: Path) -> dict[str, bytes]:
    """Return the content of the kept files by name, `run.json` last."""
    table, config = read_table(workdir / CERTIFICATES), read_json(workdir / CONFIG_FILE)
    metrics = read_lines(workdir / METRICS_FILE)
    train, certify = _commands(cell)
    rows, record, made = table.rows.values(), table.record.to_json(), table.record.provenances()
    record |= {"command": certify, "config": _without_places(record["config"])}
    run = {
        **_identity(cell),
        "images": len(rows),
        "train_command": train,
        "certify_command": certify,
        "train_seconds": _train_seconds(metrics, config),
        "certify_seconds": round(sum(seconds_of(row["time"]) for row in rows), 1),
        "calls": [
            {"device": NOT_RECORDED, "processor": NOT_RECORDED} | {key: call[key] for key in call if key != "where"}
            for call in calls_of(workdir)
        ],
        "certified_with": next(iter(made), {}),
        "continued_with": made[1:],
    }
    packed = gzip.compress(table.record.schema.text(rows).encode(), mtime=0)  # no time: the same bytes at every call
    return {
        PACKED: packed,
        RECORD: _json(record),
        CONFIG_FILE: _json(_without_places(config)),
        METRICS_FILE: "".join(json.dumps(line) + "\n" for line in metrics).encode(),
        RUN_FILE: _json(run),
    }


def _identity(cell: Cell) -> dict[str, Any]:
    """Return the settings that identify a kept cell."""
    return {
        **{name: getattr(cell, name) for name in ("table", "method", "sigma", "seed", "lbd")},
        "epochs": cell.config().num_epochs,
        "images": cell.selection.size,
        "n": cell.n,
        "deviations": deviations(cell),
    }


def _has_all_images(cell: Cell, kept: dict[str, Any]) -> bool:
    """Return whether the cell has all images of the kept cell and more, and so may replace it."""
    images, chosen = kept.get("images"), cell.selection
    if not isinstance(images, int) or not 0 < images < chosen.size:
        return False
    return -(-chosen.split_size // images) % chosen.skip == 0  # every 20th image is one of every 4th


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def read_results(folder: Path) -> list[Result]:
    """Read the finished cells in a folder such as `results/mnist`, ordered by sigma, method, weight and seed.

    A `UserError` is raised when there is no finished cell, or a cell is damaged: its lines are not those that were
    finished, claim more than their counts prove, or are of other settings than `run.json` says.
    """
    found = []
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            made = read_json(path)
        except FileNotFoundError:  # it is being replaced
            continue
        try:
            settings = (
                _text("method", made["method"]),
                number_above("sigma", made["sigma"], 0),
                whole_number("seed", made["seed"], at_least=0),
                None if made["lbd"] is None else number_from("lbd", made["lbd"], at_least=0),
                whole_number("epochs", made["epochs"], at_least=0),
                tuple(_text("deviations", each) for each in made["deviations"]),
            )
            for call in made.get("calls", []):
                _text("program", call["program"])
            for call in (*made.get("calls", []), made.get("certified_with", {}), *made.get("continued_with", [])):
                for name in ("device", "processor", "git_commit"):
                    _text(name, call.get(name, ""), optional=True)
        except KeyError as error:
            raise UserError(f"{path} lacks {error}; run reproduce.py again for this cell") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); run reproduce.py again for this cell") from None
        certificates, record = _certificates(path.parent)
        _check_made(path, made, certificates, record)
        found.append(Result(path.parent.name, *settings, made, certificates, record.get("data_digest")))
    if not found:
        raise UserError(f"{folder} holds no finished cell; run reproduce.py without --render first")
    return sorted(found, key=lambda one: (one.sigma, one.method, one.lbd or 0, one.seed))


def _certificates(folder: Path) -> tuple[Certificates, dict[str, Any]]:
    """Return the lines of a cell, which were finished and follow from their counts, and the content of their record."""
    path = folder / PACKED
    certificates, evidence = load(path)
    if evidence is None:
        raise UserError(
            f"{path} has no counts that prove its radii, or no record; run reproduce.py again for this cell"
        )
    if not standing(path)[0]:
        raise UserError(f"{path} is not finished; run reproduce.py again for this cell")
    return certificates, content_beside(path)


def _check_made(path: Path, made: dict[str, Any], certificates: Certificates, record: dict[str, Any]) -> None:
    """Raise a `UserError` where `run.json` contradicts the record, or hides a deviation from the published cell.

    What a plan never changes must be as published: alpha, n0, bound and the other settings of the votes.
    """
    there = {**{name: record[name] for name in ("sigma", "seed", "n")}, "images": len(certificates.idx)}
    there["table"] = path.parents[1].name
    config = flatten(record.get("config") or {})
    if missing := [key for key in ("method", "consistency.lbd", "num_epochs") if key not in config]:
        raise UserError(f"{path.parent / RECORD} lacks config.{missing[0]}; run reproduce.py again for this cell")
    base, weight = config["method"], config["consistency.lbd"]
    with_term = "consistency" if base == "gaussian" else f"{base}+consistency"
    there |= {"method": with_term if weight else base, "epochs": config["num_epochs"]}
    there |= {"lbd": weight if made["lbd"] is not None else None}
    differing = [f"{name}: {made.get(name)} -> {there[name]}" for name in there if made.get(name) != there[name]]
    if differing:
        raise UserError(
            f"{path} contradicts the record of the certificates beside it ({'; '.join(differing)}); run reproduce.py"
            " again for this cell"
        )
    selection = Selection(record["split_size"], record["skip"], record["max"])
    cell = Cell(*(made[name] for name in ("table", "method", "sigma", "seed", "lbd")), {}, selection, made["n"])
    published = flatten(cell.config())
    cell = cell._replace(overrides={key: value for key, value in config.items() if value != published.get(key, value)})
    fixed = {**PUBLISHED_VOTES, "tolerance": None, "split": "test", "shard": None}
    fixed |= {"skip": -(-selection.split_size // selection.size)}
    fixed |= {name: config.get(key) for name, key in _OF_CONFIG.items()}
    found = [f"{name} {record.get(name)}" for name, value in fixed.items() if record.get(name) != value]
    unnamed = [text for text in (*found, *deviations(cell)) if text not in made["deviations"]]
    if unnamed:
        raise UserError(
            f"{path} does not name all deviations from the published cell ({'; '.join(unnamed)}); run reproduce.py"
            " again for this cell"
        )


def _text(name: str, value: Any, *, optional: bool = False) -> str:
    """Return a text; a `TypeError` for another value, except for None where the text is optional."""
    if not (isinstance(value, str) or (optional and value is None)):
        raise TypeError(f"{name}={value!r} is no text")
    return value


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the folders of this machine."""
    dataset = {**config["dataset"], "data_dir": "", "cache_dir": ""}
    catrs = {**config["catrs"], "teacher": Path(config["catrs"]["teacher"]).name}
    return {**config, "dataset": dataset, "catrs": catrs, "init_from": Path(config["init_from"]).name}


def _commands(cell: Cell) -> tuple[str, str]:
    """Return the commands of train.py and certify.py, without the folders of this machine."""
    workdir, overrides = Path("runs") / cell.name, dict(cell.overrides)
    for key in ("dataset.data_dir", "dataset.cache_dir"):
        overrides.pop(key, None)
    for key in {"catrs.teacher", "init_from"} & overrides.keys():
        overrides[key] = f"runs/{Path(overrides[key]).name}"
    train = cell._replace(overrides=overrides).train_arguments(Path(), workdir)
    certify = cell.certify_arguments(workdir)
    return " ".join(["python train.py", *train]), " ".join(["python certify.py", *certify])


def _train_seconds(metrics: list[dict[str, Any]], config: dict[str, Any]) -> float:
    """Return the seconds of all training steps, with compilation, without evaluation and checkpoints.

    The seconds of an epoch follow from its measured speed. Steps that an interruption undid count once.
    """
    total, before = 0.0, 0
    for line in metrics:
        total += (line["step"] - before) * config["batch_size"] / line["noisy_images_per_second"]
        before = line["step"]
    return round(total, 1)
