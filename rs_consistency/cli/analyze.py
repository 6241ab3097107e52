"""Says what certificate files mean: ACR, accuracies, abstention; and writes a report about them.

    python analyze.py runs/a runs/b/certificates.tsv --output=report

A PATH is a run's folder or any file in the field's format, from whatever program. Files of certify.py hold the counts
that the radii follow from: they are checked against them, and recomputed by

    python analyze.py runs/a --alpha=0.01 --bound=two_class --joint

--output writes into a folder

    report.html              all of the following, in one file that needs no other
    certified_accuracy.png   curves with 95 % bands; all figures also as .pdf
    acr.png, p_a.png         ACR with 95 % intervals; the distribution of p_A
    comparison.png           radii of two runs on the same images, and
    gained_lost.png          the images that gained and lost most
    training.png             training curves
    margins.png              logit margins of clean and noisy images
    images_1.png, ...        least and most robust images, noisy copies, votes; a figure for each run
    tables.md, tables.tex    the tables
    measures.csv, comparisons.csv, differences.csv: a line for each file, each two files, each of their common images

as far as the files allow: training needs a run's folder, p_A counts, margins and images a checkpoint and its dataset.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rs_consistency.certificates.joint import DEFAULT_DELTA, joint_statement
from rs_consistency.certificates.measures import DEFAULT_RADII, summarize, summarize_votes
from rs_consistency.certificates.proof import Evidence, load
from rs_consistency.certificates.read import Certificates
from rs_consistency.cli.common import Parser, program_words, run_main, run_program
from rs_consistency.common.checks import probability
from rs_consistency.common.errors import UserError
from rs_consistency.report import formats, tables
from rs_consistency.statistics.bounds import BOUNDS


def _parser() -> Parser:
    parser = Parser(prog=program_words("analyze")[-1], description=__doc__)
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
    add("--output", type=Path, help="a folder for the report: see above")
    add("--no_network", action="store_true", help="ask no run's network: a report without logit margins and images")
    add("--data_dir", default="", help="folder of the prepared datasets (default: that of the run)")
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
    loaded, summaries = [], []
    for path in paths:
        table, evidence = load(
            path, alpha=args.alpha, bound=args.bound, bonferroni=args.bonferroni, need_counts=args.joint
        )
        summary = {**summarize(path, table, args.radii), **summarize_votes(evidence)}
        if args.joint:
            summary |= joint_statement(table, args.radii, alpha=evidence.settings.alpha, delta=args.delta)
        loaded.append((table, evidence))
        summaries.append(summary)
    print(_FORMATS[args.format](summaries), end="", flush=True)
    if output:
        _report(args, paths, loaded, summaries, output)
        if args.format == "text":
            figures = {"curves": "certified_accuracy.png"}
            if any(evidence for _, evidence in loaded):
                figures["p_A"] = "p_a.png"
            print("".join(f"\n{name}: {output / file}" for name, file in {**figures, "report": "report.html"}.items()))


def _report(
    args: Any,
    paths: list[Path],
    loaded: list[tuple[Certificates, Evidence | None]],
    summaries: list[dict[str, Any]],
    output: Path,
) -> None:
    """Writes the report about files that were read."""
    from rs_consistency.report.contents import subject
    from rs_consistency.report.page import write_report
    from rs_consistency.report.plots import short_labels  # matplotlib is slow to import

    output.mkdir(parents=True, exist_ok=True)
    subjects = [subject(label, path, *one) for label, path, one in zip(short_labels(paths), paths, loaded, strict=True)]
    asked = {"alpha": args.alpha, "bound": args.bound}
    recomputed = [f"{name} = {value}" for name, value in asked.items() if value is not None]
    if args.bonferroni:
        recomputed.append("alpha divided by the number of images of the file (Bonferroni)")
    if not args.no_network and any(one.record for one in subjects):
        from rs_consistency.devices.host import keep_compiled, keep_memory  # JAX, slow to import

        keep_compiled()
        keep_memory()
    write_report(
        subjects,
        summaries,
        output,
        recomputed=", ".join(recomputed),
        ask_networks=not args.no_network,
        data_dir=args.data_dir,
    )


def _tables(summaries: list[dict[str, Any]]) -> list[list[list[str]]]:
    """What is printed for people: tables, each a header and rows."""
    found = [tables.measures(summaries)]
    if any(summary["n"] for summary in summaries):
        found.append(tables.votes(summaries))
    if "wrong_at_most" in summaries[0]:
        found.append(tables.joint(summaries))
    return found


def _text(summaries: list[dict[str, Any]]) -> str:
    return "\n".join(map(formats.aligned, _tables(summaries)))


def _markdown(summaries: list[dict[str, Any]]) -> str:
    return "\n".join(map(formats.markdown, _tables(summaries)))


def _json(summaries: list[dict[str, Any]]) -> str:
    return json.dumps(summaries, indent=2, allow_nan=False) + "\n"


_FORMATS = {"json": _json, "text": _text, "csv": formats.csv_text, "markdown": _markdown}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, argv)


def run() -> None:
    """The command, as all that its process does."""
    run_program(main)
