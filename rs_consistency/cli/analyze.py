"""Says what certificate files mean: ACR, accuracies, abstention; and draws their curves.

    python analyze.py runs/a runs/b/certificates.tsv --output=figures

A PATH is a run's folder or any file in the field's format, from whatever program.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rs_consistency.analysis import DEFAULT_RADII, read_certificates, summarize
from rs_consistency.cli.common import Parser, run_main
from rs_consistency.errors import UserError


def _parser() -> Parser:
    parser = Parser(prog="analyze.py", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a workdir or a certificate file")
    add("--radii", nargs="+", type=float, default=DEFAULT_RADII, help="radii of the certified accuracies")
    add("--format", choices=tuple(_FORMATS), default="text", help="of the table")
    add("--output", type=Path, help="a folder for the curves, certified_accuracy.png")
    return parser


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    for radius in args.radii:
        if not (math.isfinite(radius) and radius >= 0):
            raise UserError(f"radii: {radius} is not a radius; use numbers of at least 0")
    paths = [path.expanduser() for path in args.paths]
    output = args.output and args.output.expanduser()
    if output and output.suffix == ".png":
        raise UserError(f"output={output}: give a folder; the picture in it is called certified_accuracy.png")
    tables = [read_certificates(path) for path in paths]
    summaries = [summarize(path, table, args.radii) for path, table in zip(paths, tables, strict=True)]
    print(_FORMATS[args.format](summaries), end="")
    if output:
        from rs_consistency.plots import save_curves, short_labels  # matplotlib is slow to import

        output.mkdir(parents=True, exist_ok=True)
        figure = output / "certified_accuracy.png"
        save_curves(dict(zip(short_labels(paths), tables, strict=True)), figure)
        if args.format == "text":
            print(f"\ncurves: {figure}")


def _rows(summaries: list[dict[str, Any]]) -> list[list[str]]:
    """A header and a row of text for each file."""
    radii = list(summaries[0]["certified_accuracy"])
    header = ["path", "images", "ACR", "accuracy", "abstention", *(f"r={radius}" for radius in radii)]
    rows = [
        [
            summary["path"],
            str(summary["n_images"]),
            f"{summary['acr']:.4f}",
            f"{summary['accuracy']:.4f}",
            f"{summary['abstention']:.4f}",
            *(f"{share:.3f}" for share in summary["certified_accuracy"].values()),
        ]
        for summary in summaries
    ]
    return [header, *rows]


def _text(summaries: list[dict[str, Any]]) -> str:
    rows = _rows(summaries)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _csv(summaries: list[dict[str, Any]]) -> str:
    """Full precision, the names of the JSON format, a column for each radius."""
    flat = []
    for summary in summaries:
        shares = summary["certified_accuracy"]
        rest = {name: value for name, value in summary.items() if name != "certified_accuracy"}
        flat.append({**rest, **{f"certified_accuracy_{radius}": share for radius, share in shares.items()}})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, flat[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _markdown(summaries: list[dict[str, Any]]) -> str:
    header, *rest = _rows(summaries)
    lines = [header, ["---", *("---:" for _ in header[1:])], *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _json(summaries: list[dict[str, Any]]) -> str:
    return json.dumps(summaries, indent=2) + "\n"


_FORMATS = {"json": _json, "text": _text, "csv": _csv, "markdown": _markdown}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, argv)
