"""The files of a report: tables, figures, CSV, and the page, whose sections and captions are in the template."""

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image

from rs_consistency.certificates.columns import CERTIFY
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
_TITLES = {  # of the tables, by their names in the template
    "measures": "Average certified radius and certified accuracy",
    "joint": "Lower bounds of the certified accuracy, with probability 1 - delta each",
    "votes": "What the votes said",
    "compared": "ACR differences on common images, and the numbers of the images that gained and lost most",
    "attacked": "Certificates and attacks on the same images",
    "settings": "How the files were made",
}


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
      summaries: from `measures.summarize`, one for each, with those of `joint.joint_statement` where they are wanted.
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
    found = _tables(subjects, named, comparisons, samples)
    with_best = tables.are_compared(summaries)
    drawn, pictures = _figures(subjects, comparisons, samples, readers, with_best), {}
    with progress_bar("drawing", len(drawn), unit="figure", brief=True) as bar:
        for name, draw in drawn.items():
            draw(folder / f"{name}.png")
            pictures[name] = _embed(folder / f"{name}.png")
            bar.update()
    write_tables({_TITLES[name]: cells for name, cells in found.items()}, folder)
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
        subjects=subjects,
        summaries=named,
        notes=tables.notes(named),
        best=with_best,
        comparisons=comparisons,
        left_out=len(comparisons) - _MOST_PANELS,
        samples=samples,
        titles=_TITLES,
        tables=found,
        pictures=pictures,
        recomputed=recomputed,
        alarms=[f"{one.label}: {alarm}" for one in subjects for _, _, alarm in one.attacked() if alarm],
        missing=[*missing, *unread, *apart],
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def write_tables(found: Mapping[str, formats.Cells], folder: Path) -> None:
    """Write tables, by their titles, as Markdown and as LaTeX."""
    parts = (f"{title}:\n\n{formats.markdown(cells)}" for title, cells in found.items())
    write_text(folder / "tables.md", "\n".join(parts))
    needs = "% The tables of report.html; \\usepackage{booktabs}.\n\n"
    parts = (f"% {title}\n{formats.latex(cells)}" for title, cells in found.items())
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
            radii = {"radius": {"first": first, "second": second}, "difference": first - second}
            images.append(pair | {"image": one.images[place], "label": one.labels[place]} | radii)
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
        if one.certificates.mode != CERTIFY.name:  # `compare` names it
            continue
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


def _tables(
    subjects: Sequence[Subject],
    named: Sequence[dict[str, Any]],
    comparisons: Sequence[Comparison],
    samples: "dict[str, Samples]",
) -> dict[str, formats.Cells]:
    """Return the tables of a report by their names in `_TITLES`, with a run's label in the place of its path."""
    found = {"measures": tables.measures(named, [one.interval for one in subjects])}
    if "wrong_at_most" in named[0]:
        found["joint"] = tables.joint(named)
    if any(one.evidence for one in subjects):
        clean = {label: float(np.mean(one.clean_margins >= 0)) for label, one in samples.items()}
        found["votes"] = tables.votes(named, clean)
    for cells in found.values():
        cells[0][0] = "run"
    if comparisons:
        found["compared"] = tables.compared(comparisons)
    if attacked := tables.attacked(subjects):
        found["attacked"] = attacked
    return found | {"settings": tables.settings(subjects)}


def _figures(
    subjects: Sequence[Subject],
    comparisons: Sequence[Comparison],
    samples: "dict[str, Samples]",
    readers: dict[str, _Reader],
    with_best: bool,
) -> dict[str, Callable[[Path], None]]:
    """Return the functions that draw the figures of a report as a PNG with a PDF beside it, by the files' names."""
    found: dict[str, Callable[[Path], None]] = {}
    if any(one.certificates.mode == CERTIFY.name for one in subjects):
        curves = {one.label: one.certificates for one in subjects}
        found["certified_accuracy"] = partial(save_curves, curves, with_best=with_best)
        found["acr"] = partial(figures.save_acr, subjects)
    if any(one.evidence for one in subjects):
        found["p_a"] = partial(save_p_a, {one.label: one.evidence for one in subjects})
    if comparisons:
        found["comparison"] = partial(figures.save_comparisons, comparisons[:_MOST_PANELS])
    pictured = []
    for one in comparisons[:_MOST_PICTURED]:
        read = readers.get(one.first, readers.get(one.second))
        if read and (one.gained() or one.lost()):
            pictured.append((one, *(read(one.images[places])[0] for places in (one.gained(), one.lost()))))
    if pictured:
        found["gained_lost"] = partial(figures.save_gained_lost, pictured)
    if any(one.attacked() for one in subjects):
        found["attacked"] = partial(figures.save_attacks, subjects)
    if any(one.metrics for one in subjects):
        found["training"] = partial(figures.save_training, subjects)
    if samples:
        found["margins"] = partial(figures.save_margins, samples)
    strips = {f"images_{number}": partial(figures.save_strip, *one) for number, one in enumerate(samples.items(), 1)}
    return found | strips
