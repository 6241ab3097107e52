"""Summarizes certificate files: ACR, accuracies, abstention; and writes a report about them.

    python analyze.py runs/a runs/b/certificates.tsv --output=report

A PATH is a run's folder, any file in the field's format, from any program, or a folder of such files. They may be
packed (.gz). Files of certify.py hold the counts that the radii follow from. The radii are checked against the counts,
and recomputed by

    python analyze.py runs/a --alpha=0.01 --bound=two_class --joint

--exact proves every line of such files in whole numbers, from its counts and without SciPy. It includes the error of
the grid sampler; noise of the float sampler it takes for exact Gaussian noise.

Files of other programs number the images of MNIST, Fashion-MNIST and CIFAR in the order of the original files. Given
the folder of these files, --match_images finds each image by its pixels, and compares image by image:

    python analyze.py runs/a authors.tsv --match_images=~/datasets

--output writes into a folder

    report.html              all of the following, in a single file
    certified_accuracy.png   curves with 95 % bands; all figures also as .pdf
    acr.png, p_a.png         ACR with 95 % intervals; the distribution of p of the true class
    comparison.png           radii of two runs on the same images, and
    gained_lost.png          the images with the largest gains and losses
    attacked.png             certified radius and attack of each image
    training.png             training curves
    margins.png              logit margins of clean and noisy images
    images_1.png, ...        least and most robust images, noisy copies, votes; a figure for each run
    tables.md, tables.tex    the tables
    measures.csv, comparisons.csv, differences.csv: a line for each file, each two files, each of their common images

as far as the files allow: training.png needs a run's folder, p_a.png counts, attacked.png an attacks.tsv beside the
certificates, and margins.png and images_1.png a checkpoint and its dataset.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.exact_lines import Proven, prove
from rs_consistency.certificates.joint import DEFAULT_DELTA, joint_statement
from rs_consistency.certificates.measures import DEFAULT_RADII, summarize
from rs_consistency.certificates.proof import Evidence, load
from rs_consistency.certificates.read import Certificates, certificate_files, certificate_path, standing
from rs_consistency.certificates.record import content_beside
from rs_consistency.cli.common import Parser, entry_point, program_words, user_path, user_place
from rs_consistency.common.checks import probability
from rs_consistency.common.errors import UserError, note, say
from rs_consistency.common.progress import progress_bar
from rs_consistency.report import formats, tables
from rs_consistency.statistics.bounds import BOUNDS

_NEEDED = (
    ("delta", ["joint"], "--joint"),
    ("no_network", ["output"], "--output=FOLDER"),
    ("data_dir", ["output", "match_images"], "--output=FOLDER or --match_images=FOLDER, which read a dataset"),
)


def _parser() -> Parser:
    parser = Parser(prog=program_words("analyze")[-1], description=__doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=user_path, metavar="PATH", help="a workdir, a certificate file or a folder of them")
    add("--radii", nargs="+", type=float, default=DEFAULT_RADII, help="radii of the certified accuracies")
    add("--alpha", type=float, help="recompute at this error probability of a certificate (default: the file's lines)")
    add("--bound", help=f"recompute with this bound: {', '.join(BOUNDS)} (default: the file's lines)")
    add(
        "--bonferroni",
        action="store_true",
        help="recompute at alpha / images: all certificates of a file hold at once with probability 1 - alpha",
    )
    add("--joint", action="store_true", help="bound the true certified accuracy, of these images and of new ones")
    add("--delta", type=float, help=f"error probability of a --joint bound (default: {DEFAULT_DELTA})")
    exact = "prove every line from its counts, in whole numbers: a line that claims 1e-6 more is refused"
    add("--exact", action="store_true", help=exact)
    match = (
        "compare with files in the original order of the images; DIR holds the dataset's original files. The"
        " differences are printed as text and as markdown"
    )
    add("--match_images", type=user_path, metavar="DIR", help=match)
    add("--format", choices=tuple(_FORMATS), default="text", help="of the tables (default: %(default)s)")
    add("--output", type=user_path, help="a folder for the report: see above")
    add("--no_network", action="store_true", help="use no run's network: a report without logit margins and images")
    add("--data_dir", type=user_place, help="folder of the prepared datasets (default: the run's)")
    return parser


def _main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv, needed=_NEEDED)
    args.delta = DEFAULT_DELTA if args.delta is None else args.delta
    args.data_dir = args.data_dir or ""
    for radius in args.radii:
        if not (math.isfinite(radius) and radius >= 0):
            raise UserError(f"radii: {radius} is not a radius; use numbers of at least 0")
    probability("delta", args.delta)
    if args.match_images and args.format not in _WRITERS and not args.output:
        raise UserError(f"match_images: format={args.format} has no comparisons; use text or markdown, or add --output")
    if args.output and args.output.suffix == ".png":
        raise UserError(f"output={args.output}: give a folder; the picture in it is called certified_accuracy.png")
    settings = {"alpha": args.alpha, "bound": args.bound, "bonferroni": args.bonferroni, "need_counts": args.joint}
    args.paths = [file for path in args.paths for file in certificate_files(path)]
    reading = progress_bar("reading", len(args.paths), unit="file", brief=True, iterable=args.paths)
    loaded = [load(path, **settings) for path in reading]
    finished, faults = zip(*map(standing, args.paths), strict=True)
    for fault in filter(None, () if args.output else faults):  # the report names them, too
        note(fault)
    proven = [
        prove(path, evidence) if args.exact else None for path, (_, evidence) in zip(args.paths, loaded, strict=True)
    ]
    if args.match_images:
        loaded = _matched(args, loaded)
    summaries = _summaries(args, loaded, proven, finished)
    show = say if args.output else partial(print, flush=True)  # the report has it all
    show(_FORMATS[args.format](summaries).removesuffix("\n"))
    if args.exact and args.format in _WRITERS:
        for path, each in zip(args.paths, proven, strict=True):
            show(f"\n{_TEXTS[args.format](str(path))}: {each.text()}")
    if args.match_images and args.format in _WRITERS:
        _show_comparisons(args, loaded, show)
    if args.output:
        _report(args, loaded, faults, summaries)
        if args.format == "text":
            show("")
            if any(table.mode == CERTIFY.name for table, _ in loaded):
                show(f"curves: {args.output / 'certified_accuracy.png'}")
            if any(evidence for _, evidence in loaded):
                show(f"p_A: {args.output / 'p_a.png'}")
            show(f"report: {args.output / 'report.html'}")


_Loaded = list[tuple[Certificates, Evidence | None]]


def _summaries(
    args: Any, loaded: _Loaded, proven: Sequence[Proven | None], finished: Sequence[bool | None]
) -> list[dict[str, Any]]:
    """Return the measures of all files, with proofs and joint statements where they were asked for."""
    summaries = summarize(args.paths, loaded, [_record(path) for path in args.paths], args.radii)
    for summary, (table, evidence), each, is_finished in zip(summaries, loaded, proven, finished, strict=True):
        summary["finished"] = is_finished  # see `read.standing`
        if each:
            summary["exact"] = each.claims
        if args.joint:
            summary |= joint_statement(table, args.radii, alpha=evidence.settings.alpha, delta=args.delta)
    return summaries


def _record(path: Path) -> Mapping[str, Any]:
    """Return the content of a file's record; {} for a file of another program, or with a damaged record."""
    try:
        return content_beside(certificate_path(path))
    except UserError:
        return {}


def _matched(args: Any, loaded: _Loaded) -> _Loaded:
    """Return the files with the numbers of their images in one order."""
    from rs_consistency.certificates.matching import match_images  # reads a dataset, and imports JAX

    tables = match_images(
        [(path, table) for path, (table, _) in zip(args.paths, loaded, strict=True)],
        args.match_images,
        data_dir=args.data_dir,
    )
    return [(table, evidence) for table, (_, evidence) in zip(tables, loaded, strict=True)]


def _show_comparisons(args: Any, loaded: _Loaded, show: Callable[[str], None]) -> None:
    """Show the ACR differences on common images, and a note for each two files without such images."""
    from rs_consistency.report.contents import compare, subject  # SciPy's statistics, slow to import

    found, apart = compare([subject(str(path), path, *file) for path, file in zip(args.paths, loaded, strict=True)])
    for line in apart:
        note(line)
    if found:
        show("\n" + _WRITERS[args.format](tables.compared(found)).removesuffix("\n"))


def _report(args: Any, loaded: _Loaded, faults: Sequence[str], summaries: list[dict[str, Any]]) -> None:
    """Write the report about the files; the faults are from `read.standing`."""
    from rs_consistency.report.contents import subject
    from rs_consistency.report.page import write_report
    from rs_consistency.report.plots import short_labels  # matplotlib is slow to import

    args.output.mkdir(parents=True, exist_ok=True)
    labels = short_labels(args.paths)
    files = zip(labels, args.paths, loaded, faults, strict=True)
    subjects = [subject(label, path, *file, fault) for label, path, file, fault in files]
    asked = {"alpha": args.alpha, "bound": args.bound}
    recomputed = [f"{name} = {value}" for name, value in asked.items() if value is not None]
    if args.bonferroni:
        recomputed.append("alpha divided by the number of images of the file (Bonferroni)")
    if not args.no_network and any(each.record for each in subjects):
        from rs_consistency.devices.host import keep_compiled, keep_memory  # JAX, slow to import

        keep_compiled()
        keep_memory()
    write_report(
        subjects,
        summaries,
        args.output,
        recomputed=", ".join(recomputed),
        ask_networks=not args.no_network,
        data_dir=args.data_dir,
    )


def _printed(name: str, summaries: list[dict[str, Any]]) -> str:
    """Return the printed tables in a format, with the sentences below the first."""
    write = _WRITERS[name]
    parts = [write(tables.measures(summaries))]
    if notes := tables.notes(summaries):
        parts.append("".join(f"{_TEXTS[name](line)}\n" for line in notes))
    if any(summary["n"] for summary in summaries):
        parts.append(write(tables.votes(summaries)))
    if "wrong_at_most" in summaries[0]:
        parts.append(write(tables.joint(summaries)))
    return "\n".join(parts)


_WRITERS = {"text": formats.aligned, "markdown": formats.markdown}
_TEXTS = {"text": formats.plain_text, "markdown": formats.markdown_text}
_FORMATS = {
    "json": lambda summaries: json.dumps(summaries, indent=2, allow_nan=False) + "\n",
    "text": partial(_printed, "text"),
    "csv": formats.csv_text,
    "markdown": partial(_printed, "markdown"),
}

main = entry_point(_main)
