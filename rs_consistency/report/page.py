"""Writes a report: figures, tables, and the page that holds all of them."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from PIL import Image
from tqdm import tqdm

from rs_consistency.common.errors import UserError, note
from rs_consistency.common.files import write_text
from rs_consistency.report import figures, formats, tables
from rs_consistency.report.contents import Comparison, Subject, compare
from rs_consistency.report.plots import DPI, save_curves, save_p_a

if TYPE_CHECKING:  # JAX, slow to import, which is not needed where no network is asked
    from rs_consistency.data import OpenSplit
    from rs_consistency.report.samples import Samples

PAGE = "report.html"
_CSS_DPI = 96  # pixels of an inch, in style sheets
_MOST_PANELS = 12  # of comparisons in a figure
_MOST_PICTURED = 6  # comparisons whose images are shown
_SECONDS_BEFORE_BAR = 2
_MEANING = (
    "A certified radius says: the smoothed classifier gives this class at every point within that l2 distance of the"
    " image (pixels in [0, 1]). It is made from random votes, and wrong with probability at most alpha, for each image"
    " by itself, if alpha and bound were chosen before the votes were seen.",
    "Certified accuracy at radius r is the share of images with the right class and a radius of at least r; accuracy is"
    " that at radius 0. ACR, the average certified radius, is the mean of the radius over all images, 0 where the class"
    " is wrong or the certificate abstains.",
    "Bands and intervals say how far chance in the choice of the test images goes: with about 95 % confidence they hold"
    " the value over all images of the kind, if these were drawn from them at random. Bands are those of Clopper and"
    " Pearson, at each radius by itself; intervals of the ACR and of its differences are percentile bootstrap intervals"
    " with 10,000 resamples.",
    "They do not tell how another training seed would have come out, and not the chance in the votes, which alpha"
    " bounds.",
)


class Table(NamedTuple):
    """A table of a report.

    Attributes:
      title: what it shows.
      cells: its lines, the header first.
    """

    title: str
    cells: list[list[str]]


class Figure(NamedTuple):
    """A figure of a report.

    Attributes:
      name: of its files, without ending.
      alt: what can be seen, for those who do not see it.
      caption: how to read it.
      draw: writes the PNG of a path, and the PDF beside it.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Path], None]


class Section(NamedTuple):
    """A part of a report, which is left out when it holds nothing.

    Attributes:
      title: of the part.
      tables: in their order.
      figures: in their order.
    """

    title: str
    tables: Sequence[Table]
    figures: Sequence[Figure]


class Asked(NamedTuple):
    """What networks and datasets said.

    Attributes:
      samples: label -> what its network said.
      splits: label -> its images.
      missing: what is not there, and why, a line each.
    """

    samples: "dict[str, Samples]"
    splits: "dict[str, OpenSplit]"
    missing: list[str]


def write_report(
    subjects: Sequence[Subject],
    summaries: Sequence[dict[str, Any]],
    folder: Path,
    *,
    recomputed: str = "",
    ask_networks: bool = True,
    data_dir: str = "",
) -> Path:
    """Writes `report.html`, the figures, and the tables: `tables.md`, `tables.tex` and three CSV files.

    `measures.csv` has a line for each file. `comparisons.csv` has one for each two files with common images, and
    `differences.csv` one for each of those images, those that gained most first. All files are replaced atomically, and
    a function of the arguments: the same report is the same bytes. A note on stderr tells what could not be had of
    which run; without it, the report is as good.

    Args:
      subjects: from `contents.subject`, with labels of their own.
      summaries: from `measures.summarize`, `measures.summarize_votes` and `joint.joint_statement`, one for each.
      folder: where to; exists.
      recomputed: with what the radii were computed again from the counts; empty for those of the files.
      ask_networks: restore networks and read datasets, for logit margins and images.
      data_dir: folder of prepared datasets; empty for those that the runs name.

    Returns:
      The path of the page.
    """
    comparisons, apart = compare(subjects)
    asked = _ask(subjects, data_dir) if ask_networks else Asked({}, {}, [])
    named = [{**summary, "path": one.label} for one, summary in zip(subjects, summaries, strict=True)]
    sections = [
        _results(subjects, named),
        _votes(subjects, named),
        _compared(comparisons, asked),
        _training(subjects),
        *_networks(asked),
        Section("Settings", [Table("How the files were made", tables.settings(subjects))], []),
    ]
    sections = [section for section in sections if section.tables or section.figures]
    drawn = [figure for section in sections for figure in section.figures]
    embedded: dict[str, dict[str, Any]] = {}
    for figure in tqdm(drawn, desc="drawing", unit="figure", leave=False, delay=_SECONDS_BEFORE_BAR):
        path = folder / f"{figure.name}.png"
        figure.draw(path)
        embedded[figure.name] = _embed(path)
    _write_tables(sections, folder)
    _write_csv(subjects, summaries, comparisons, folder)
    unread = [f"{one.label}: {line}" for one in subjects for line in one.notes]
    for line in unread:
        note(line)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rs_consistency", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        labels=[one.label for one in subjects],
        sections=sections,
        embedded=embedded,
        meaning=_MEANING,
        recomputed=recomputed,
        missing=[*asked.missing, *unread, *apart],
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _embed(path: Path) -> dict[str, Any]:
    """A PNG as part of a page, in its natural size, as fonts are meant to be read."""
    with Image.open(path) as picture:
        width, height = (round(_CSS_DPI * pixels / DPI) for pixels in picture.size)
    return {"data": base64.b64encode(path.read_bytes()).decode("ascii"), "width": width, "height": height}


def _ask(subjects: Sequence[Subject], data_dir: str) -> Asked:
    """Asks the network of every subject that has one; of the others, says why not."""
    asked, opened = Asked({}, {}, []), {}
    for one in subjects:
        lacks = f"no logit margins and no image strip of {one.label}"
        if not one.record:  # another program's file, of which nobody expects them
            asked.missing.append(f"{lacks}: {one.path} has no record of certify.py")
            continue
        from rs_consistency.report import samples  # JAX, slow to import

        data = (one.record.get("data_digest"), one.record.get("split"))
        try:
            if data not in opened:
                opened[data] = samples.open_images(one, data_dir=data_dir)
            asked.splits[one.label] = opened[data]
            asked.samples[one.label] = samples.ask(one, opened[data])
        except UserError as error:
            asked.missing.append(f"{lacks}: {error}")
            note(asked.missing[-1])
    return asked


def _results(subjects: Sequence[Subject], named: Sequence[dict[str, Any]]) -> Section:
    """Certified accuracy and ACR."""
    intervals = [one.interval for one in subjects]
    told = "; ".join(f"{one['path']}: ACR {one['acr']:.3f}, accuracy {one['accuracy']:.3f}" for one in named)
    parts = [Table("Average certified radius and certified accuracy", _of_runs(tables.measures(named, intervals)))]
    if "wrong_at_most" in named[0]:
        title = "Lower bounds of the certified accuracy, with probability 1 - delta each"
        parts.append(Table(title, _of_runs(tables.joint(named))))
    curves = {one.label: one.certificates for one in subjects}
    return Section(
        "Certified accuracy",
        parts,
        [
            Figure(
                "certified_accuracy",
                f"Falling step curves of certified accuracy against the l2 radius. {told}.",
                "Certified accuracy against radius. The band around a curve is its 95 % confidence band over images, at"
                " each radius by itself.",
                lambda path: save_curves(curves, path),
            ),
            Figure(
                "acr",
                f"A point with a bar for each run. {told}.",
                "Average certified radius, with its 95 % bootstrap interval over images. Runs on the same images are"
                " told apart better by their differences than by these bars.",
                lambda path: figures.save_acr(subjects, path),
            ),
        ],
    )


def _votes(subjects: Sequence[Subject], named: Sequence[dict[str, Any]]) -> Section:
    """p_A, of the files that have counts."""
    evidences = {one.label: one.evidence for one in subjects}
    if not any(evidences.values()):
        return Section("", [], [])
    told = "; ".join(
        f"{one['path']}: median count / n {one['p_a']['0.5']:.4f}, at the ceiling {one['at_ceiling']:.3f}"
        for one in named
        if one["n"]
    )
    return Section(
        "Votes",
        [Table("What the votes said", _of_runs(tables.votes(named)))],
        [
            Figure(
                "p_a",
                f"Rising step curves: the share of images whose p_A is at most the value on the axis. {told}.",
                "Distribution of p_A, the probability of the certified class under noise, over images. Bold: its lower"
                " confidence bound, which the radius follows from; thin: the share of the votes. The bound cannot pass"
                " the ceiling, where all votes agree.",
                lambda path: save_p_a(evidences, path),
            )
        ],
    )


def _compared(comparisons: Sequence[Comparison], asked: Asked) -> Section:
    """Differences on the same images."""
    if not comparisons:
        return Section("", [], [])
    told = "; ".join(
        f"{one.first} minus {one.second}: {one.difference.mean:+.3f}, {one.difference.gained} gained,"
        f" {one.difference.lost} lost"
        for one in comparisons
    )
    left_out = len(comparisons) - _MOST_PANELS
    more = f" {left_out} more comparisons are in the table only." if left_out > 0 else ""
    found = [
        Figure(
            "comparison",
            f"Scatter plots of the radii of two runs against each other. {told}.",
            "A point is an image, at its radius for both runs, 0 where the class is wrong. Above the line it gained"
            f" from the run on the vertical axis, below it lost.{more}",
            lambda path: figures.save_comparisons(comparisons[:_MOST_PANELS], path),
        )
    ]
    pictures = []
    for one in comparisons[:_MOST_PICTURED]:
        split = asked.splits.get(one.first, asked.splits.get(one.second))
        if split is not None and (one.gained() or one.lost()):
            pictures.append((one, *(split.read(one.images[places])[0] for places in (one.gained(), one.lost()))))
    if pictures:
        found.append(
            Figure(
                "gained_lost",
                "The images that gained most and that lost most; the table names them.",
                "The images that gained most and that lost most: number, label, and the radius for the first run minus"
                " that for the second, 0 where the class is wrong.",
                lambda path: figures.save_gained_lost(pictures, path),
            )
        )
    title = "ACR differences on common images, and the numbers of the images that gained and lost most"
    return Section("The same images compared", [Table(title, tables.compared(comparisons))], found)


def _training(subjects: Sequence[Subject]) -> Section:
    """Training curves, of the runs that have records of it."""
    trained = [one.label for one in subjects if one.metrics]
    if not trained:
        return Section("", [], [])
    return Section(
        "Training",
        [],
        [
            Figure(
                "training",
                f"Loss, and accuracy on noisy test images, by epoch, of {', '.join(trained)}.",
                "Losses of different methods have different terms: their heights do not compare. The accuracy is that"
                " of the network on single noisy images, not of the smoothed classifier.",
                lambda path: figures.save_training(subjects, path),
            )
        ],
    )


def _networks(asked: Asked) -> list[Section]:
    """Logit margins and image strips, of the runs whose networks were asked."""
    if not asked.samples:
        return []
    told = "; ".join(
        f"{label}: clean {one.clean_margins.mean():.2f} +- {one.clean_margins.std():.2f},"
        f" noisy {one.noisy_margins.mean():.2f} +- {one.noisy_margins.std():.2f}, among copies of an image"
        f" {one.within():.2f}"
        for label, one in asked.samples.items()
    )
    margins = Figure(
        "margins",
        f"Histograms of the logit margin of clean and noisy images, a panel for each run. {told}.",
        "The logit of the true class minus the largest other one, for the network without smoothing: positive where it"
        " is right. Consistency regularization asks the noisy copies of an image to agree: the deviation among them,"
        " beside the mean, says how far they do.",
        lambda path: figures.save_margins(asked.samples, path),
    )
    strips = [
        Figure(
            f"images_{number}",
            f"Small test images of {label}, each with noisy copies of it and a bar chart of {one.votes[0].sum()} votes;"
            f" least robust: {', '.join(map(str, one.shown[: one.least]))}; most robust:"
            f" {', '.join(map(str, one.shown[one.least :])) or 'none'}.",
            f"{label}: the least robust images, wrong ones with a large radius first, and the most robust ones; noisy"
            " copies with the network's class for each; and votes, filled for the label. The votes are new ones, for"
            " illustration: no certificate rests on them.",
            lambda path, label=label, one=one: figures.save_strip(label, one, path),
        )
        for number, (label, one) in enumerate(asked.samples.items(), start=1)
    ]
    return [Section("Logit margins", [], [margins]), Section("Least and most robust images", [], strips)]


def _of_runs(cells: list[list[str]]) -> list[list[str]]:
    """A table of files, whose first column says `path`, as one of runs by their labels."""
    return [["run", *cells[0][1:]], *cells[1:]]


def _write_tables(sections: Sequence[Section], folder: Path) -> None:
    """All tables as Markdown and as LaTeX."""
    found = [table for section in sections for table in section.tables]
    write_text(folder / "tables.md", "\n".join(f"{one.title}:\n\n{formats.markdown(one.cells)}" for one in found))
    needs = "% The tables of report.html; \\usepackage{booktabs}.\n\n"
    parts = (f"% {' '.join(one.title.split())}\n{formats.latex(one.cells)}" for one in found)
    write_text(folder / "tables.tex", needs + "\n".join(parts))


def _write_csv(
    subjects: Sequence[Subject], summaries: Sequence[dict[str, Any]], comparisons: Sequence[Comparison], folder: Path
) -> None:
    """What a spreadsheet, or another program, goes on with; in full precision."""
    measured = [
        {
            "run": one.label,
            **summary,
            "acr_low": one.interval and one.interval.low,
            "acr_high": one.interval and one.interval.high,
        }
        for one, summary in zip(subjects, summaries, strict=True)
    ]
    write_text(folder / "measures.csv", formats.csv_text(measured))
    if not comparisons:
        return
    differences = [
        {
            "first": one.first,
            "second": one.second,
            **one.difference._asdict(),
            "interval": one.difference.interval._asdict(),
        }
        for one in comparisons
    ]
    write_text(folder / "comparisons.csv", formats.csv_text(differences))
    images = [
        {
            "first": one.first,
            "second": one.second,
            "image": one.images[place],
            "label": one.labels[place],
            "radius_first": one.radii[0, place],
            "radius_second": one.radii[1, place],
            "difference": one.radii[0, place] - one.radii[1, place],
        }
        for one in comparisons
        for place in one.order()
    ]
    write_text(folder / "differences.csv", formats.csv_text(images))
