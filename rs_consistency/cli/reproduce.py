"""Reproduces a published table: trains and certifies what is missing of it, and puts the numbers side by side.

    python reproduce.py --table=mnist --images=500 --workdir=runs/mnist --dry_run    the plan, and how long it takes
    python reproduce.py --table=mnist --images=500 --workdir=runs/mnist              all of it; run again, it continues
    python reproduce.py --table=mnist --render                                       only the table, from results/

Every cell of the table is a run in a workdir of its own. Interrupt it, kill it, or let a cell fail: the others go on,
and the same command does what is left. Several machines share a table through a common folder: with the same command
on each, which takes what no other is at, or by --shard=1/3, 2/3, 3/3.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import configs
from rs_consistency.certificates.selection import parse_shard
from rs_consistency.cli.common import Parser, check_flags, entry_point, note_repeated, program_words, user_path, whole
from rs_consistency.common.checks import whole_number
from rs_consistency.common.errors import EXIT_FAILED_CELLS, UserError, note, say
from rs_consistency.common.files import check_utf8
from rs_consistency.reproduction.plan import (
    Cell,
    Options,
    chosen_here,
    deviations,
    make_plan,
    not_available,
    share_of,
)
from rs_consistency.reproduction.published import TABLES
from rs_consistency.statistics.bounds import N

_OF_RENDER = {"render", "table", "results"}


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


_numbers.__name__ = "list of numbers"


def _parser() -> Parser:
    parser = Parser(prog=program_words("reproduce")[-1], description=__doc__)
    add = parser.add_argument
    add("--table", default="mnist", help=f"{', '.join(TABLES)} (default: %(default)s)")
    add("--workdir", type=user_path, help="folder of the runs; shared by all machines that work on the table")
    add("--results", type=user_path, default=Path("results"), help="folder of what stays (default: %(default)s)")
    add("--methods", type=_names, help="rows, such as gaussian,consistency (default: those of the published table)")
    add("--sigmas", type=_numbers, help="columns, such as 0.25,0.5 (default: all)")
    add("--seeds", type=whole, default=1, help="runs of every cell, with seeds 0, 1, ... (default: %(default)s)")
    add("--images", type=whole, help="certified: every so-manyth of the test set (default: as published)")
    add("--n", type=whole, default=N, help="votes of an image (default: %(default)s)")
    add("--epochs", type=whole, help="shorter or longer training; its schedules follow (default: as published)")
    add("--dataset", help="another dataset with such images, such as mnist_subset (default: as published)")
    add("--model", help="another model, such as resnet20 (default: as published)")
    add("--config", action="append", default=[], metavar="KEY=VALUE", help="any other key of all configurations")
    jobs = "runs at a time (default: one for each processor core on a CPU, as far as there are cells; else 1)"
    add("--jobs", type=whole, help=jobs)
    add("--batch_size", type=whole, help="of certify.py: noisy images at a time; no effect on the votes")
    add("--shard", help="I/K: only share I of K of the cells, for one of several machines")
    add("--dry_run", action="store_true", help="print cells and estimated time; train nothing")
    add("--render", action="store_true", help="only write tables and pictures, from the results")
    return parser


def _main(argv: Sequence[str]) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    results = args.results
    if args.render:
        check_flags(parser.given, exclusive=[("render", other) for other in sorted(parser.given - _OF_RENDER)])
        print(_render(args.table, results))
        return
    note_repeated(args.config)
    if args.workdir is None:
        raise UserError("workdir is missing: add --workdir=FOLDER for the runs, or --render")
    folder = args.workdir.resolve()
    check_utf8(folder, "workdir")
    cells = share_of(make_plan(args.table, _options(args), workdir=folder), args.shard and parse_shard(args.shard))
    if not cells:
        raise UserError(f"shard={args.shard}: the plan has fewer cells; use fewer shards")
    from rs_consistency.devices.host import available_cores  # JAX is slow to import
    from rs_consistency.reproduction.machine import this_machine
    from rs_consistency.reproduction.results import check_keepable, keep
    from rs_consistency.reproduction.runner import Runner

    try:
        check_keepable(cells, results)  # before hours of training
        _check_writable(results / args.table)
    except UserError as error:
        if not args.dry_run:
            raise
        note(str(error))
    if args.jobs is None:
        jobs = min(available_cores(), len(cells))
    else:
        jobs = whole_number("jobs", args.jobs, at_least=1, at_most=1024)
    machine = this_machine(jobs)
    if args.jobs is None and machine.platform != "cpu":
        jobs = 1
    runner = Runner(
        folder,
        root=Path(configs.__path__[0]).parent,
        jobs=jobs,
        machine=machine,
        finished=lambda cell: keep(cell, folder / cell.name, results),
        batch_size=None if args.batch_size is None else whole_number("batch_size", args.batch_size, at_least=1),
    )
    states = [runner.look(cell) for cell in cells]
    runner.measure(cells)
    about = not_available(args.table), chosen_here(args.table, [cell.method for cell in cells])
    text = "\n".join(filter(None, [_plan(cells, states, runner, jobs), *about]))
    if args.dry_run:
        print(text)
        return
    say(text)
    outcome = runner.run(cells)
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    for cell in outcome.elsewhere:
        print(f"note: {cell.name}: another process is at it", file=sys.stderr)
    try:
        if outcome.finished:
            say(_render(args.table, results))
    except UserError as error:
        if not outcome.failed:
            raise
        note(str(error))
    if outcome.failed:
        print(f"{len(outcome.failed)} of {len(cells)} cells failed; the same command tries them again", file=sys.stderr)
        raise SystemExit(EXIT_FAILED_CELLS)


def _options(args: Any) -> Options:
    settings = {}
    for text in args.config:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"config={text}: write KEY=VALUE, such as optimizer.lr=0.02")
        settings[key] = _value(value)
    return Options(**{name: getattr(args, name) for name in Options._fields if name != "settings"}, settings=settings)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


def _plan(cells: Sequence[Cell], states: Sequence[Any], runner: Any, jobs: int) -> str:
    """Return a line for each cell, and the time of all cells together."""
    lines, to_do = [], [(cell, state) for cell, state in zip(cells, states, strict=True) if not state.certified]
    width = max(len(cell.name) for cell in cells)
    for cell, state in zip(cells, states, strict=True):
        what = "finished"
        if not state.certified:
            left = runner.speeds.estimate([(cell, state)], jobs=1).text()
            what = (
                f"epoch {state.epochs}/{cell.config().num_epochs}, image {state.images}/{cell.selection.size}, {left}"
            )
        changed = ", ".join(deviations(cell))
        lines.append(f"{cell.name:{width}}  {what}" + (f"  (not as published: {changed})" if changed else ""))
    left = runner.speeds.estimate(to_do, jobs=jobs).text()
    return "\n".join([*lines, f"{len(cells)} cells, {len(to_do)} to do, {jobs} at a time: {left}"])


def _render(table: str, results: Path) -> str:
    from rs_consistency.reproduction.render import render  # matplotlib is slow to import

    return render(table, results)


def _check_writable(folder: Path) -> None:
    """Raise a `UserError` for a folder in which no file can be made, whether it is there or not; leave nothing."""
    folder = folder.absolute()
    place = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"results={folder.parent}: {place} takes no files ({error.strerror}); choose another --results"
        ) from None


main = entry_point(_main)
