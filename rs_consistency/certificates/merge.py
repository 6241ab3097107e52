"""One certificate file from those of all shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rs_consistency.certificates.read import Progress, Table, in_order, read_table
from rs_consistency.certificates.record import check_replaceable, finished_entry, record_of
from rs_consistency.certificates.selection import parse_shard
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json, replace_atomically, write_json

_OF_SELECTION = ("split_size", "skip", "shard")


def merge(paths: Sequence[Path], output: Path) -> Progress:
    """Merges the files of all shards into the one that a single call would have made.

    Guarantee: the output has every image of the whole once, each line as the shard wrote it, and all were made with
    the same settings, parameters and data. The shards' files are only read. A kill leaves a record without a table at
    most, which the next call replaces.

    Args:
      paths: the `.tsv` files of the shards, in any order.
      output: the `.tsv` to write; a `.json` comes with it.

    Returns:
      What the output holds.

    Raises:
      UserError: for files that are no shards of one certification (the differing settings are named), a shard given
        twice or missing, an image twice or missing, a damaged or changed file, or an output that is there already with
        another content.
    """
    record_path = record_of(output)
    if not output.parent.is_dir():
        raise UserError(f"output={output}: its folder does not exist; create it, or choose another --output")
    if output.exists() and any(path.exists() and path.samefile(output) for path in paths):
        raise UserError(f"output={output} is one of the files to merge; choose another --output")
    if not paths:
        raise UserError("merge=[]: give the .tsv files of all shards")
    tables = [_read_shard(path) for path in paths]
    for table in tables[1:]:
        _check_same(tables[0], table)
    _check_shards(tables)
    for table in tables:
        _check_whole(table)

    first = tables[0]
    rows = [row for table in tables for row in table.rows.values()]
    lines = "".join(first.schema.line(row) for row in rows)
    content = in_order((first.schema.header + lines).encode())
    record = _merged_record(tables, content)
    if output.exists():
        if not output.is_file() or output.read_bytes() != content:
            raise UserError(f"output={output} is there already with another content; choose another --output")
        if record_path.is_file() and _same_origin(read_json(record_path), record):
            return Progress().plus(rows)
    check_replaceable(record_path)
    write_json(record_path, record)
    with replace_atomically(output) as temporary:
        temporary.write_bytes(content)
    return Progress().plus(rows)


def _read_shard(path: Path) -> Table:
    table = read_table(path)
    names = table.record.get("identity")
    if not isinstance(names, list) or table.record.get("shard") is None:
        raise UserError(f"{path} is not the file of a shard; give those that certify.py --shard=I/K made")
    if not set(_OF_SELECTION) <= set(names) <= table.record.keys():
        raise UserError(f"{record_of(path)} is damaged: it lacks a key of its identity; restore it from a copy")
    return table


def _check_same(first: Table, other: Table) -> None:
    """Everything that lines depend on must be the same, but the shard's own number."""
    names = [*first.record["identity"], *other.record["identity"], "max"]
    differing = []
    for name in dict.fromkeys(names):
        values = [table.record.get(name) for table in (first, other)]
        if name == "shard":
            values = [f"of {parse_shard(value).count}" for value in values]
        if values[0] != values[1]:
            differing.append(f"{name}: {values[0]!r} / {values[1]!r}")
    if differing:
        raise UserError(
            f"{first.path} and {other.path} are no shards of one certification ({'; '.join(differing)}); give files"
            " that were made with the same settings"
        )


def _check_shards(tables: Sequence[Table]) -> None:
    """Each shard is there once."""
    places: dict[int, Path] = {}
    for table in tables:
        shard = parse_shard(table.record["shard"])
        if shard.index in places:
            raise UserError(f"{places[shard.index]} and {table.path} are both shard {shard}; give each shard once")
        places[shard.index] = table.path
    missing = [f"{index}/{shard.count}" for index in range(1, shard.count + 1) if index not in places]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UserError(
            f"shard {', '.join(missing[:8])}{more} is missing; make it with certify.py --shard={missing[0]},"
            " and give its file, too"
        )


def _check_whole(table: Table) -> None:
    """Every image of the shard is there, and nothing was changed."""
    shard, path = table.record["shard"], table.path
    missing = table.missing
    if missing:
        command = table.record.get("command", f"python certify.py with its settings and --shard={shard}")
        raise UserError(
            f"{path} lacks {len(missing)} of {len(missing) + len(table.rows)} images, such as {missing[0]};"
            f" continue it: {command}"
        )
    if table.changed:
        raise UserError(
            f"{path} was changed after it was finished (its SHA-256 is not the one in {record_of(path).name});"
            " restore it from a copy, or certify the shard again"
        )
    if len(table.rows) > len(table.selection.indices()):
        raise UserError(f"{path} has images beyond max={table.record['max']}; certify the shard again")


def _merged_record(tables: Sequence[Table], content: bytes) -> dict[str, Any]:
    """The identity without a shard, and what each shard's record says beside it."""
    ordered = sorted(tables, key=lambda table: parse_shard(table.record["shard"]).index)
    first = ordered[0].record
    common = {name: first[name] for name in (*first["identity"], "identity", "max")} | {"shard": None}
    if "config" in first:
        common["config"] = first["config"]
    shards = []
    for table in ordered:
        own = {key: value for key, value in table.record.items() if key not in common or value != common[key]}
        shards.append({"shard": table.record["shard"], "file": table.path.name} | own)
    return {**common, "shards": shards, "finished": finished_entry(content)}


def _same_origin(there: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether two records say the same of where the lines are from, whenever they were written."""
    return {**there, "finished": None} == {**record, "finished": None}
