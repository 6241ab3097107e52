"""Says what certificate files mean: ACR, accuracies, abstention; and draws their curves.

    python analyze.py runs/a runs/b/certificates.tsv --output=figures

A PATH is a run's folder or any file in the field's format, from whatever program. Files of certify.py hold the counts
that the radii follow from: they are checked against them, and recomputed by

    python analyze.py runs/a --alpha=0.01 --bound=two_class --joint
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rs_consistency.analysis import DEFAULT_RADII, summarize
from rs_consistency.bounds import BOUNDS
from rs_consistency.checks import probability
from rs_consistency.cli.common import Parser, run_main, run_program
from rs_consistency.errors import UserError
from rs_consistency.joint import DEFAULT_DELTA, joint_statement
from rs_consistency.reanalysis import load, summarize_votes


def _parser() -> Parser:
    parser = Parser(prog="analyze.py", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a workdir or a certificate file")
    add("--radii", nargs="+", type=float, default=DEFAULT_RADII, help="radii of the certified accuracies")
    add("--alpha", type=float, help="recompute at this error probability of a certificate (default: the file's lines)")
    add("--bound", help=f"recompute with this bound: {', '.join(BOUNDS)} (default: the file's lines)")
    add(
        "--bonferroni",
        action="store_true",
        help="recompute at alpha / images: all certificates of a file hold at once with probability 1 - alpha",
    )
    add("--joint", action="store_true", help="bound the true certified accuracy, of these images and of new ones")
    add(
        "--delta", type=float, default=DEFAULT_DELTA, help="error probability of a --joint bound (default: %(default)s)"
    )
    add("--format", choices=tuple(_FORMATS), default="text", help="of the tables (default: %(default)s)")
    add("--output", type=Path, help="a folder for the curves, certified_accuracy.png and p_a.png")
    return parser


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    for radius in args.radii:
        if not (math.isfinite(radius) and radius >= 0):
            raise UserError(f"radii: {radius} is not a radius; use numbers of at least 0")
    probability("delta", args.delta)
    paths = [path.expanduser() for path in args.paths]
    output = args.output and args.output.expanduser()
    if output and output.suffix == ".png":
        raise UserError(f"output={output}: give a folder; the picture in it is called certified_accuracy.png")
    tables, evidences, summaries = [], [], []
    for path in paths:
        table, evidence = load(
            path, alpha=args.alpha, bound=args.bound, bonferroni=args.bonferroni, need_counts=args.joint
        )
        summary = {**summarize(path, table, args.radii), **summarize_votes(evidence)}
        if args.joint:
            summary |= joint_statement(table, args.radii, alpha=evidence.settings.alpha, delta=args.delta)
        tables.append(table)
        evidences.append(evidence)
        summaries.append(summary)
    print(_FORMATS[args.format](summaries), end="")
    if output:
        from rs_consistency.plots import save_curves, save_p_a, short_labels  # matplotlib is slow to import

        output.mkdir(parents=True, exist_ok=True)
        labels = short_labels(paths)
        figures = {"curves": output / "certified_accuracy.png"}
        save_curves(dict(zip(labels, tables, strict=True)), figures["curves"])
        known = {label: evidence for label, evidence in zip(labels, evidences, strict=True) if evidence}
        if known:
            figures["p_A"] = output / "p_a.png"
            save_p_a(known, figures["p_A"])
        if args.format == "text":
            print("".join(f"\n{name}: {figure}" for name, figure in figures.items()))


def _tables(summaries: list[dict[str, Any]]) -> list[list[list[str]]]:
    """What is printed for people: tables, each a header and rows."""
    tables = [_measures(summaries)]
    if any(summary["n"] for summary in summaries):
        tables.append(_votes(summaries))
    if "wrong_at_most" in summaries[0]:
        tables.append(_joint(summaries))
    return tables


def _votes(summaries: list[dict[str, Any]]) -> list[list[str]]:
    """What the votes allow, and what they said; files without counts are left out."""
    shares = list(summaries[0]["p_a"])[:3]  # the low ones: the others are close to 1
    header = ["path", "sigma", "n", "alpha", "bound", "ceiling", "at ceiling"]
    rows = [
        [
            summary["path"],
            f"{summary['sigma']:g}",
            str(summary["n"]),
            f"{summary['alpha']:.4g}",
            summary["bound"],
            f"{summary['radius_ceiling']:.4f}",
            f"{summary['at_ceiling']:.4f}",
            *(f"{summary['p_a'][share]:.4f}" for share in shares),
        ]
        for summary in summaries
        if summary["n"]
    ]
    return [[*header, *(f"p_A {float(share):.0%}" for share in shares)], *rows]


def _joint(summaries: list[dict[str, Any]]) -> list[list[str]]:
    """Lower confidence bounds of the certified accuracy, two rows for each file."""
    radii = (f"r={radius}" for radius in summaries[0]["certified_accuracy"])
    rows = [["path", "lower bound for", "delta", "wrong lines", *radii]]
    for summary in summaries:
        for of, wrong, key in (
            ("these images", f"<= {summary['wrong_at_most']}", "certified_accuracy_lower"),
            ("new images", "-", "population_accuracy_lower"),
        ):
            # Rounded down; 0.829 for a counted 0.83, which is a little less in binary, would be too much of that.
            exact = [1000 * share for share in summary[key].values()]
            whole = [round(share, 6) if key == "certified_accuracy_lower" else share for share in exact]
            shares = (f"{math.floor(share) / 1000:.3f}" for share in whole)
            rows.append([summary["path"], of, f"{summary['delta']:g}", wrong, *shares])
    return rows


def _measures(summaries: list[dict[str, Any]]) -> list[list[str]]:
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
    return "\n".join(map(_aligned, _tables(summaries)))


def _aligned(rows: list[list[str]]) -> str:
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
    """Full precision, the names of the JSON format, a column for each radius; empty where the JSON has null."""
    flat = []
    for summary in summaries:
        row = {}
        for name, value in summary.items():
            row |= {f"{name}_{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat.append(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, flat[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _markdown(summaries: list[dict[str, Any]]) -> str:
    texts = []
    for header, *rest in _tables(summaries):
        lines = [header, ["---", *("---:" for _ in header[1:])], *rest]
        texts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(texts)


def _json(summaries: list[dict[str, Any]]) -> str:
    return json.dumps(summaries, indent=2, allow_nan=False) + "\n"


_FORMATS = {"json": _json, "text": _text, "csv": _csv, "markdown": _markdown}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, argv)


def run() -> None:
    """The command, as all that its process does."""
    run_program(main)
