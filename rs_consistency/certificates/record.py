"""The record of a certificate file: how its lines were made.

`NAME.tsv` holds a line per image; `certificates.columns` says what is in it. `NAME.json`, the record, holds

| key | meaning |
|---|---|
| mode | certify, decide or predict: which columns the `.tsv` has |
| the settings, data_digest, parameter_digest, ... | what the lines depend on: the identity |
| skip, split_size, shard | which images of the split: of every skip-th, the share of shard "2/5"; null: all |
| identity | the names of the keys above |
| max | how many images the file, or all shards together, are to hold |
| device, versions, code_version, code_digest, git_commit, ... | what else was recorded when the first line was made |
| continued_with | the same of calls that went on with another device, other versions or other code |
| finished | once every image is there: when, how many, and the SHA-256 of the `.tsv` |
| shards | of a merged file: what the shards' records say beside the identity |
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json

# Of a record: what may differ between the calls that write one file, and is then listed under `continued_with`.
PROVENANCE = ("device", "versions", "code_version", "code_digest", "git_commit")
_CHANGES_VOTES = ("device", "code_digest")  # beside the versions


def check_record(path: Path, record: dict[str, Any]) -> None:
    """Raises a `UserError` for a record whose parts are not of the kind that this program writes."""

    def are(kind: type, values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(value, kind) for value in values)

    places = [record, *record["shards"]] if are(dict, record.get("shards")) else [record]
    good = {
        "identity": are(str, record.get("identity", [])),
        "shards": are(dict, record.get("shards", [])),
        "continued_with": all(are(dict, place.get("continued_with", [])) for place in places),
        "versions": all(isinstance(place.get("versions", {}), dict) for place in places),
        "finished": isinstance(record.get("finished", {}), dict),
    }
    if "finished" in record and good["finished"]:
        good["finished"] = isinstance(record["finished"].get("images"), int)
    damaged = [name for name, fine in good.items() if not fine]
    if damaged:
        raise UserError(f"{path} is damaged: {', '.join(damaged)} cannot be; restore it from a copy")


def record_of(path: Path) -> Path:
    """The `.json` beside a `.tsv`; a `UserError` for a file of another name, whose record others might share."""
    if path.suffix != ".tsv":
        raise UserError(f"output={path}: the name must end in .tsv; the record beside it ends in .json")
    return path.with_suffix(".json")


def provenances(record: dict[str, Any]) -> list[dict[str, Any]]:
    """With what a file was made, by its record: every device, with versions and code; of a merged file, all shards'."""
    made = [record] if "device" in record else []
    for part in record.get("shards", []):
        made += provenances(part)
    return [{key: place.get(key) for key in PROVENANCE} for place in [*made, *record.get("continued_with", [])]]


def differing_places(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """What differs between two provenances and can change a vote: "device", "code_digest", "jax" and so on."""
    names = [key for key in _CHANGES_VOTES if here.get(key) != there.get(key)]
    mine, theirs = (place.get("versions") or {} for place in (here, there))
    return names + [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


def finished_entry(content: bytes) -> dict[str, Any]:
    """What the record of a finished table says of it."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": at, "images": content.count(b"\n") - 1, "sha256": _sha256(content)}


def check_replaceable(record_path: Path) -> None:
    """A record of a certification without images may be replaced, a file of anything else not."""
    if record_path.exists() and "parameter_digest" not in read_json(record_path):
        raise UserError(f"{record_path} is there already and is no record of a certification; choose another --output")


def is_as_finished(path: Path, record: dict[str, Any], content: bytes) -> bool:
    """Whether a table is the one of which the record says that it is finished."""
    entry = record["finished"]
    if not isinstance(entry, dict) or not {"images", "sha256"} <= entry.keys():
        raise UserError(f"{record_of(path)} is damaged: finished={entry!r}; restore it from a copy")
    return entry["sha256"] == _sha256(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
