"""The merger of the files of all shards into one certificate file."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from rs_consistency.certificates.proof import check_table
from rs_consistency.certificates.read import Table, read_table
from rs_consistency.certificates.record import Record, record_path
from rs_consistency.certificates.write import Progress, check_replaceable
from rs_consistency.common.errors import UserError, note
from rs_consistency.common.files import check_output, read_json, replace_atomically, write_json


def merge(paths: Sequence[Path], output: Path) -> Progress:
    """Merge the files of all shards, in any order, into the file and record that a single call would have made.

    Guarantee: the output has every image of the whole once, each line as the shard wrote it, and all were made with
    the same settings, parameters and data. Columns that shards of an earlier version lack are left out, with a note.
    The shards' files are only read. A kill leaves at most a record without a table, which the next call replaces.

    Raises:
      UserError: for files that are no shards of one certification (the differing settings are named), a shard given
        twice or missing, an image twice or missing, a damaged or changed file, a line that claims more than its counts
        prove, or an output that is there already with another content, or is replaced meanwhile.
    """
    beside = record_path(output)
    check_output(output)
    if output.exists() and any(path.exists() and path.samefile(output) for path in paths):
        raise UserError(f"output={output} is one of the files to merge; choose another --output")
    if not paths:
        raise UserError("merge=[]: give the .tsv files of all shards")
    tables = _sorted_shards([read_table(path) for path in paths])
    for table in tables:
        _check_whole(table)
    rows = [row for table in tables for row in table.rows.values()]
    schema = tables[0].record.schema
    content = schema.text(rows).encode()
    added = set(schema.columns) - set(schema.older.columns)
    if len({added <= row.keys() for row in rows}) > 1:
        note(f"{output} has no columns {', '.join(sorted(added))}: shards of an earlier version lack them")
    record = _merged_record(tables, beside).finish(content)
    if output.exists() and output.read_bytes() != content:
        raise UserError(f"output={output} is there already with another content; choose another --output")
    check_replaceable(beside)
    there = read_json(beside) if output.exists() and beside.is_file() else {}
    if {**there, "finished": None} != {**record.content, "finished": None}:  # but for the time
        write_json(beside, record.to_json())
        with replace_atomically(output) as temporary:
            temporary.write_bytes(content)
        there = record.to_json()
    if not output.exists() or output.read_bytes() != content or read_json(beside) != there:
        raise UserError(f"output={output} or {beside.name} was replaced by another process meanwhile; merge again")
    return Progress().plus(rows)


def _sorted_shards(tables: Sequence[Table]) -> list[Table]:
    """Return the tables in the order of their shards; a `UserError` when they are not each shard of one call, once."""
    first, by_index = tables[0], dict[int, Table]()
    for table in tables:
        record, shard = table.record, table.record.selection.shard
        if shard is None:
            raise UserError(f"{table.path} is not the file of a shard; give those that certify.py --shard=I/K made")
        wanted = {**dict.fromkeys(first.record.identity), **record.identity, "max": record.selection.most}
        count = first.record.selection.shard.count
        if shard.count == count:
            del wanted["shard"]
        differing = first.record.differences(wanted)
        if differing:
            raise UserError(
                f"{first.path} and {table.path} are no shards of one certification ({'; '.join(differing)}); give files"
                " that were made with the same settings"
            )
        if shard.index in by_index:
            other = by_index[shard.index].path
            raise UserError(f"{other} and {table.path} are both shard {shard}; give each shard once")
        by_index[shard.index] = table
    missing = (f"{index}/{count}" for index in range(1, count + 1) if index not in by_index)
    named, number = list(itertools.islice(missing, 8)), count - len(by_index)  # `count` may be any number
    if named:
        more = f" and {number - 8} more" if number > 8 else ""
        raise UserError(
            f"shard {', '.join(named)}{more} is missing; make it with certify.py --shard={named[0]}, and give its"
            " file, too"
        )
    return [by_index[index] for index in sorted(by_index)]


def _check_whole(table: Table) -> None:
    """Raise a `UserError` when an image of the shard is missing, the file was changed, or counts contradict a line."""
    record, path, images = table.record, table.path, table.record.selection.images
    if table.missing:
        settings = f"python certify.py with its settings and --shard={record.selection.shard}"
        such = next(index for index in images if index not in table.rows)
        raise UserError(
            f"{path} lacks {table.missing} of {len(images)} images, such as {such};"
            f" continue it: {record.content.get('command', settings)}"
        )
    check_table(table, path)


def _merged_record(tables: Sequence[Table], path: Path) -> Record:
    """Return the record of the whole: the common identity, and whatever else the record of each shard holds."""
    first, shards = tables[0].record, []
    names = [*first.identity, "identity", "max", *(["config"] if "config" in first.content else [])]
    common = {name: first.content[name] for name in names} | {"shard": None}
    for table in tables:
        content = table.record.content
        own = {key: value for key, value in content.items() if key not in common or value != common[key]}
        shards.append({"shard": content["shard"], "file": table.path.name} | own)
    return Record.from_json(path, {**common, "shards": shards})
