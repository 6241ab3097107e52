"""The page of a report: its sections, the captions of its figures, and all files that are written."""

import base64
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from rs_consistency.common.errors import UserError, note
from rs_consistency.common.files import write_text
from rs_consistency.common.progress import progress_bar
from rs_consistency.report import figures, formats, tables
from rs_consistency.report.contents import Comparison, Subject, compare
from rs_consistency.report.plots import DPI, save_curves, save_p_a

if TYPE_CHECKING:  # JAX, slow to import, which is not needed where no network is asked
    from rs_consistency.report.samples import Samples

PAGE = "report.html"
_CSS_DPI = 96  # pixels of an inch, in style sheets
_MOST_PANELS = 12  # of comparisons in a figure
_MOST_PICTURED = 6  # comparisons whose images are shown
_Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # numbers -> images float32 in [0, 1], and labels
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
    """A table of a report: its title, and its lines of cells, the header first."""

    title: str
    cells: list[list[str]]


class Figure(NamedTuple):
    """A figure of a report.

    Attributes:
      name: of its files, without ending.
      alt: description for readers who do not see the figure.
      caption: how to read it.
      draw: writes the PNG at a path, and the PDF beside it.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Path], None]


class Section(NamedTuple):
    """A part of a report: its title, tables and figures, in their order."""

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def write_report(
    subjects: Sequence[Subject],
    summaries: Sequence[dict[str, Any]],
    folder: Path,
    *,
    recomputed: str = "",
    ask_networks: bool = True,
    data_dir: str = "",
) -> Path:
    """Write `report.html`, the figures, and the tables: `tables.md`, `tables.tex` and three CSV files.

    `measures.csv` has a line for each file. `comparisons.csv` has a line for each two files with common images, and
    `differences.csv` a line for each of these images, the largest gain first. All files are replaced atomically, and
    are a function of the arguments: the same report is the same bytes. A note on stderr names everything that is
    missing of a run; the rest of the report is as good without it.

    Args:
      subjects: from `contents.subject`, with different labels.
      summaries: from `measures.summarize`, `measures.summarize_votes` and `joint.joint_statement`, one for each.
      folder: an existing folder.
      recomputed: settings that the radii were recomputed with; empty for the radii of the files.
      ask_networks: restore networks and read datasets, for logit margins and images.
      data_dir: folder of prepared datasets; empty for the folders that the runs name.

    Returns:
      The path of the page.
    """
    comparisons, apart = compare(subjects)
    samples, readers, missing = _ask(subjects, data_dir) if ask_networks else ({}, {}, [])
    named = [{**summary, "path": one.label} for one, summary in zip(subjects, summaries, strict=True)]
    sections = [_results(subjects, named)]
    if any(one.evidence for one in subjects):
        sections.append(_votes(subjects, named))
    if comparisons:
        sections.append(_compared(comparisons, readers))
    if any(one.metrics for one in subjects):
        sections.append(_training(subjects))
    if samples:
        sections += [_margins(samples), _strips(samples)]
    sections.append(Section("Settings", [Table("How the files were made", tables.settings(subjects))]))
    drawn, embedded = [figure for section in sections for figure in section.figures], {}
    with progress_bar("drawing", len(drawn), unit="figure", brief=True) as bar:
        for figure in drawn:
            path = folder / f"{figure.name}.png"
            figure.draw(path)
            embedded[figure.name] = _embed(path)
            bar.update()
    write_tables([table for section in sections for table in section.tables], folder)
    write_csv(subjects, summaries, comparisons, folder)
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
        missing=[*missing, *unread, *apart],
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def write_tables(found: Sequence[Table], folder: Path) -> None:
    """Write all tables as Markdown and as LaTeX."""
    write_text(folder / "tables.md", "\n".join(f"{one.title}:\n\n{formats.markdown(one.cells)}" for one in found))
    needs = "% The tables of report.html; \\usepackage{booktabs}.\n\n"
    parts = (f"% {' '.join(one.title.split())}\n{formats.latex(one.cells)}" for one in found)
    write_text(folder / "tables.tex", needs + "\n".join(parts))


def write_csv(
    subjects: Sequence[Subject], summaries: Sequence[dict[str, Any]], comparisons: Sequence[Comparison], folder: Path
) -> None:
    """Write measures and, where there are any, comparisons as CSV in full precision."""
    measured = []
    for one, summary in zip(subjects, summaries, strict=True):
        low, high = one.interval or (None, None)
        measured.append({"run": one.label, **summary, "acr_low": low, "acr_high": high})
    write_text(folder / "measures.csv", formats.csv_text(measured))
    if not comparisons:
        return
    compared, images = [], []
    for one in comparisons:
        pair = {"first": one.first, "second": one.second}
        compared.append(pair | one.difference._asdict() | {"interval": one.difference.interval._asdict()})
        for place in one.order():
            first, second = one.radii[:, place]
            image = {"image": one.images[place], "label": one.labels[place]}
            radii = {"radius_first": first, "radius_second": second, "difference": first - second}
            images.append(pair | image | radii)
    write_text(folder / "comparisons.csv", formats.csv_text(compared))
    write_text(folder / "differences.csv", formats.csv_text(images))


def _embed(path: Path) -> dict[str, Any]:
    """Return a PNG as part of a page, in its natural size, in which its fonts are legible."""
    with Image.open(path) as picture:
        width, height = (round(_CSS_DPI * pixels / DPI) for pixels in picture.size)
    return {"data": base64.b64encode(path.read_bytes()).decode("ascii"), "width": width, "height": height}


def _ask(subjects: Sequence[Subject], data_dir: str) -> "tuple[dict[str, Samples], dict[str, _Reader], list[str]]":
    """Return by label the answers of networks and the readers of images, and a line for each missing answer."""
    found, readers, missing, opened = {}, {}, [], {}
    for one in subjects:
        lacks = f"no logit margins and no image strip of {one.label}"
        if not one.record:  # another program's file, whose reader expects no images
            missing.append(f"{lacks}: {one.path} has no record of certify.py")
            continue
        from rs_consistency.report import samples  # JAX, slow to import

        data = (one.record.get("data_digest"), one.record.get("split"))
        try:
            if data not in opened:
                opened[data] = samples.open_images(one, data_dir=data_dir)
            readers[one.label] = partial(samples.read_images, opened[data])
            found[one.label] = samples.ask(one, opened[data])
        except UserError as error:
            missing.append(f"{lacks}: {error}")
            note(missing[-1])
    return found, readers, missing


def _results(subjects: Sequence[Subject], named: Sequence[dict[str, Any]]) -> Section:
    """Return certified accuracy and ACR."""
    intervals = [one.interval for one in subjects]
    summary = "; ".join(f"{one['path']}: ACR {one['acr']:.3f}, accuracy {one['accuracy']:.3f}" for one in named)
    found = [Table("Average certified radius and certified accuracy", _of_runs(tables.measures(named, intervals)))]
    if "wrong_at_most" in named[0]:
        title = "Lower bounds of the certified accuracy, with probability 1 - delta each"
        found.append(Table(title, _of_runs(tables.joint(named))))
    curves = Figure(
        "certified_accuracy",
        f"Falling step curves of certified accuracy against the l2 radius. {summary}.",
        "Certified accuracy against radius. The band around a curve is its 95 % confidence band over images, at"
        " each radius by itself.",
        partial(save_curves, {one.label: one.certificates for one in subjects}),
    )
    points = Figure(
        "acr",
        f"A point with a bar for each run. {summary}.",
        "Average certified radius, with its 95 % bootstrap interval over images. Runs on the same images are"
        " told apart better by their differences than by these bars.",
        partial(figures.save_acr, subjects),
    )
    return Section("Certified accuracy", found, [curves, points])


def _votes(subjects: Sequence[Subject], named: Sequence[dict[str, Any]]) -> Section:
    """Return p_A of the files with counts, of which there is at least one."""
    summary = "; ".join(
        f"{one['path']}: median count / n {one['p_a']['0.5']:.4f}, at the ceiling {one['at_ceiling']:.3f}"
        for one in named
        if one["n"]
    )
    curves = Figure(
        "p_a",
        f"Rising step curves: the share of images whose p_A is at most the value on the axis. {summary}.",
        "Distribution of p_A, the probability of the certified class under noise, over images. Bold: its lower"
        " confidence bound, which the radius follows from; thin: the share of the votes. The bound cannot pass"
        " the ceiling, where all votes agree.",
        partial(save_p_a, {one.label: one.evidence for one in subjects}),
    )
    return Section("Votes", [Table("What the votes said", _of_runs(tables.votes(named)))], [curves])


def _compared(comparisons: Sequence[Comparison], readers: dict[str, _Reader]) -> Section:
    """Return the differences on the same images, of at least one comparison."""
    summary = "; ".join(
        f"{one.first} minus {one.second}: {one.difference.mean:+.3f}, {one.difference.gained} gained,"
        f" {one.difference.lost} lost"
        for one in comparisons
    )
    left_out = len(comparisons) - _MOST_PANELS
    more = f" {left_out} more comparisons are in the table only." if left_out > 0 else ""
    points = Figure(
        "comparison",
        f"Scatter plots of the radii of two runs against each other. {summary}.",
        "A point is an image, at its radius for both runs, 0 where the class is wrong. Above the line it gained"
        f" from the run on the vertical axis, below it lost.{more}",
        partial(figures.save_comparisons, comparisons[:_MOST_PANELS]),
    )
    pictured = []
    for one in comparisons[:_MOST_PICTURED]:
        read = readers.get(one.first, readers.get(one.second))
        if read and (one.gained() or one.lost()):
            pictured.append((one, *(read(one.images[places])[0] for places in (one.gained(), one.lost()))))
    pictures = Figure(
        "gained_lost",
        "The images that gained most and that lost most; the table names them.",
        "The images that gained most and that lost most: number, label, and the radius for the first run minus"
        " that for the second, 0 where the class is wrong.",
        partial(figures.save_gained_lost, pictured),
    )
    title = "ACR differences on common images, and the numbers of the images that gained and lost most"
    found = [Table(title, tables.compared(comparisons))]
    return Section("The same images compared", found, [points, pictures] if pictured else [points])


def _training(subjects: Sequence[Subject]) -> Section:
    """Return the training curves of the runs with metrics, of which there is at least one."""
    trained = [one.label for one in subjects if one.metrics]
    curves = Figure(
        "training",
        f"Loss, and accuracy on noisy test images, by epoch, of {', '.join(trained)}.",
        "Losses of different methods have different terms: their heights do not compare. The accuracy is that"
        " of the network on single noisy images, not of the smoothed classifier.",
        partial(figures.save_training, subjects),
    )
    return Section("Training", figures=[curves])


def _margins(samples: "dict[str, Samples]") -> Section:
    """Return the logit margins of the runs whose networks answered."""
    summary = "; ".join(
        f"{label}: clean {one.clean_margins.mean():.2f} +- {one.clean_margins.std():.2f},"
        f" noisy {one.noisy_margins.mean():.2f} +- {one.noisy_margins.std():.2f}, among copies of an image"
        f" {one.within():.2f}"
        for label, one in samples.items()
    )
    histograms = Figure(
        "margins",
        f"Histograms of the logit margin of clean and noisy images, a panel for each run. {summary}.",
        "The logit of the true class minus the largest other one, for the network without smoothing: positive where it"
        " is right. Consistency regularization asks the noisy copies of an image to agree: the deviation among them,"
        " beside the mean, says how far they do.",
        partial(figures.save_margins, samples),
    )
    return Section("Logit margins", figures=[histograms])


def _strips(samples: "dict[str, Samples]") -> Section:
    """Return the image strips of the runs whose networks answered."""
    strips = [
        Figure(
            f"images_{number}",
            f"Small test images of {label}, each with noisy copies of it and a bar chart of {one.votes[0].sum()} votes;"
            f" least robust: {', '.join(map(str, one.shown[: one.least]))}; most robust:"
            f" {', '.join(map(str, one.shown[one.least :])) or 'none'}.",
            f"{label}: the least robust images, wrong ones with a large radius first, and the most robust ones; noisy"
            " copies with the network's class for each; and votes, filled for the label. The votes are new ones, for"
            " illustration: no certificate rests on them.",
            partial(figures.save_strip, label, one),
        )
        for number, (label, one) in enumerate(samples.items(), start=1)
    ]
    return Section("Least and most robust images", figures=strips)


def _of_runs(cells: list[list[str]]) -> list[list[str]]:
    """Return a table of files, whose first column is `path`, as a table of runs by their labels."""
    return [["run", *cells[0][1:]], *cells[1:]]
