"""What stays of a finished cell: certificates, settings, metrics, and how they came about; in a few hundred kilobytes.

`RESULTS/TABLE/CELL/` holds `certificates.tsv.gz` and `certificates.json` (as certify.py wrote them), `config.json`,
`metrics.jsonl` and `run.json`. Folders of this machine are left out of them.
"""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

from rs_consistency.analysis import Certificates, read_certificates
from rs_consistency.errors import UserError
from rs_consistency.files import read_json, replace_atomically, write_json
from rs_consistency.metrics import METRICS_FILE, read_lines
from rs_consistency.reproduction.plan import Cell, deviations
from rs_consistency.reproduction.runner import provenance_of
from rs_consistency.reproduction.state import CERTIFICATES
from rs_consistency.rows import seconds_of
from rs_consistency.tables import PROVENANCE, in_order, record_of
from rs_consistency.workdir import CONFIG_FILE

PACKED = "certificates.tsv.gz"
RUN_FILE = "run.json"


class Result(NamedTuple):
    """A finished cell.

    Attributes:
      name: of its folder.
      method: of the table.
      sigma: standard deviation of the noise.
      seed: of training and certification.
      lbd: weight of the consistency term in a table that compares weights; else None.
      epochs: trained.
      deviations: what is not as published, a phrase each.
      made: on which device, with which commit, and more.
      certificates: the lines.
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


def keep(cell: Cell, workdir: Path, results: Path) -> Path:
    """Copies what stays of a finished cell; whatever was there is replaced, file by file, `run.json` last.

    Args:
      cell: finished.
      workdir: of it.
      results: folder of all tables.

    Returns:
      The cell's folder in it.
    """
    folder = results / cell.table / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    content = in_order((workdir / CERTIFICATES).read_bytes())
    with replace_atomically(folder / PACKED) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0))  # without a time: the same bytes at every call
    record = read_json(record_of(workdir / CERTIFICATES))
    record["command"] = _command("certify", cell.certify_arguments(Path("runs") / cell.name))
    record["config"] = _without_places(record["config"])
    write_json(folder / "certificates.json", record)
    config = _without_places(read_json(workdir / CONFIG_FILE))
    write_json(folder / CONFIG_FILE, config)
    metrics = read_lines(workdir / METRICS_FILE)
    with replace_atomically(folder / METRICS_FILE) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    arguments = cell._replace(overrides=_named(cell.overrides)).train_arguments(Path(), Path("runs") / cell.name)
    write_json(
        folder / RUN_FILE,
        {
            "table": cell.table, "method": cell.method, "sigma": cell.sigma, "seed": cell.seed, "lbd": cell.lbd,
            "epochs": config["num_epochs"], "images": cell.selection.size, "n": cell.n, "deviations": deviations(cell),
            "train_command": _command("train", arguments), "certify_command": record["command"],
            "train_seconds": _train_seconds(metrics, config), "certify_seconds": _certify_seconds(content),
            "calls": provenance_of(workdir),
            "certified_with": {key: record.get(key) for key in PROVENANCE},
        },
    )  # fmt: skip
    return folder


def read_results(folder: Path) -> list[Result]:
    """The finished cells of one table, ordered by sigma, method, weight and seed.

    Args:
      folder: such as `results/mnist`.

    Raises:
      UserError: when there are none, or one is damaged.
    """
    found = []
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        made = read_json(path)
        try:
            result = Result(
                path.parent.name, made["method"], float(made["sigma"]), int(made["seed"]), made["lbd"],
                int(made["epochs"]), tuple(made["deviations"]), made, read_certificates(path.parent / PACKED),
            )  # fmt: skip
        except KeyError as error:
            raise UserError(f"{path} lacks {error}; run reproduce.py again for this cell") from None
        found.append(result)
    if not found:
        raise UserError(f"{folder} holds no finished cell; run reproduce.py without --render first")
    return sorted(found, key=lambda one: (one.sigma, one.method, one.lbd or 0, one.seed))


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the folders of this machine."""
    dataset = {**config["dataset"], "data_dir": "", "cache_dir": ""}
    catrs = {**config["catrs"], "teacher": Path(config["catrs"]["teacher"]).name}
    return {**config, "dataset": dataset, "catrs": catrs, "init_from": Path(config["init_from"]).name}


def _named(overrides: Any) -> dict[str, Any]:
    teacher = overrides.get("catrs.teacher")
    return {**overrides, **({"catrs.teacher": f"runs/{Path(teacher).name}"} if teacher else {})}


def _command(program: str, arguments: list[str]) -> str:
    return " ".join(["python", f"{program}.py", *arguments])


def _train_seconds(metrics: list[dict[str, Any]], config: dict[str, Any]) -> float:
    """Of the steps of all epochs, without evaluation and compilation."""
    total, before = 0.0, 0
    for line in metrics:
        total += (line["step"] - before) * config["batch_size"] / line["noisy_images_per_second"]
        before = line["step"]
    return round(total, 1)


def _certify_seconds(content: bytes) -> float:
    return round(sum(seconds_of(line.split("\t")[5]) for line in content.decode().splitlines()[1:]), 1)
