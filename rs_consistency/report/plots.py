"""Curves of certificates: certified accuracy and p_A; the styles, labels and files of all figures."""

import io
import os
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.measures import acr, ceiling, lower_of_label, votes_for_label
from rs_consistency.certificates.proof import Evidence
from rs_consistency.certificates.read import Certificates
from rs_consistency.certificates.record import unpacked_path
from rs_consistency.common.files import replace_atomically
from rs_consistency.report.formats import plain_text
from rs_consistency.statistics.intervals import binomial_interval

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision; line styles tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")
_TICKS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999, 0.999999, 0.99999999)  # as many as have space
DPI = 200  # of a PNG
# Of a figure, with the settings of each; no date in it, so that the same figure is the same file.
FORMATS = {"png": {"dpi": DPI}, "pdf": {"metadata": {"CreationDate": None}}}
_ROUNDING = 1e-9  # of a count that is whole but for rounding
_LEGEND_WIDTH = 72  # characters
_ROW_INCHES = 0.21  # of a legend
_WORDS = re.compile(r"(\s+|[^\s/_-]*[/_-]+)")  # a line may end behind each
_LEFTMOST = 0.01  # an image with a smaller p_A is far from any certificate, and drawn as if it had this one


def line_style(place: int) -> dict[str, Any]:
    """Return colour and line style of the run at a position; every figure shows a run in the same style."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place % len(STYLES)]}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as the PNG of that path and as a PDF beside it, replace older files, and close the figure."""
    with plt.rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():  # fonts as they are, which journals ask for
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)  # shown as a box
        try:
            for name, settings in FORMATS.items():
                content = io.BytesIO()  # on a failing disk, Matplotlib's writer of PDFs raises errors of its own
                figure.savefig(content, format=name, **settings)
                with replace_atomically(path.with_suffix(f".{name}")) as temporary:
                    temporary.write_bytes(content.getvalue())
        finally:
            plt.close(figure)


def plain(text: str, width: int = _LEGEND_WIDTH) -> str:
    """Return text that a figure shows as it is, in lines of at most `width` characters.

    Lines end behind a space, slash, underscore or hyphen where they can. Matplotlib would take dollars as mathematics,
    and leave a name that begins with an underscore out of a legend.
    """
    wrapper = textwrap.TextWrapper(width)
    wrapper.wordsep_re = _WORDS
    lines = wrapper.wrap(text)
    return ("\n".join([" " + line if line.startswith("_") else line for line in lines])).replace("$", r"\$")


def legend_below(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, room: int = 6, columns: int = 1
) -> None:
    """Write a legend below the axes. The figure becomes higher by all rows of it beyond the `room`."""
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    rows = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + _ROW_INCHES * max(0, rows - room))


def save_curves(tables: Mapping[str, Certificates], path: Path, *, with_best: bool = False) -> None:
    """Draw certified accuracy against radius, one curve for each table, with its 95 % band, as PNG and PDF.

    The band is the Clopper-Pearson interval at each radius by itself, for the certified accuracy on all images of the
    kind that these were drawn from. A table of several seeds holds an image several times: its curve is the mean over
    the lines. Its band then takes a mean over images for a count of images, rounded outwards: no narrower than it must
    be, since a mean of shares varies no more than a count.

    Args:
      tables: by their labels, such as those of `short_labels`. Tables of decisions and predictions are left out, and
        keep their colours for the other figures.
      path: of the PNG.
      with_best: draw the largest certified accuracy of all tables at each radius, too.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    certified = {label: np.sort(table.radius[table.correct == 1]) for label, table in tables.items()}
    certified = {label: radii for label, radii in certified.items() if tables[label].mode == CERTIFY.name}
    for i, (label, table) in enumerate(tables.items()):
        if label not in certified:
            continue
        # Certified accuracy is constant up to the next radius and drops behind it.
        radii = certified[label]
        counts, x = np.arange(len(radii), -1, -1), np.concatenate([[0.0], radii])
        images = len(np.unique(table.idx))
        hits = images * counts / len(table.idx)
        low, _ = binomial_interval(np.floor(hits + _ROUNDING).astype(int), images)
        _, high = binomial_interval(np.ceil(hits - _ROUNDING).astype(int), images)
        style = line_style(i)
        band = {"facecolor": (style["color"], 0.15), "edgecolor": (style["color"], 0.6), "linewidth": 0.6}
        axes.fill_between(x, low, high, step="post", linestyle=style["linestyle"], **band)
        legend = plain(f"{label}: ACR {acr(table):.3f}, {images} images")
        axes.step(x, counts / len(table.radius), where="post", label=legend, **style)
    if with_best:
        x = np.unique(np.concatenate([[0.0], *certified.values()]))
        behind = [
            (len(radii) - np.searchsorted(radii, x, side="right")) / len(tables[label].radius)
            for label, radii in certified.items()
        ]
        beneath = {"color": "0.35", "alpha": 0.45, "linewidth": 5, "zorder": 1.5}  # the curves keep their colours
        axes.step(x, np.max(behind, axis=0), where="post", label="the best at each radius", **beneath)
    axes.set(xlabel="l2 radius (bands: 95 % over images)", ylabel="certified accuracy", ylim=(0, 1.01))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    legend_below(figure, *axes.get_legend_handles_labels())
    save(figure, path)


def save_p_a(evidences: Mapping[str, Evidence | None], path: Path) -> None:
    """Draw the distribution of p, of the true class, over the images: a distribution function a file, as PNG and PDF.

    The axis is Phi^-1(p), the radius in units of sigma, since p itself is close to 1 for most images. The bold curve is
    the lower confidence bound. Its largest value, where all votes agree, is the ceiling. The thin curve is the share of
    the votes, which shows what the confidence costs. It is marked at 1/2, where the hard images end, and at its right
    end, which lies below 1 if images have all votes. The area where a lower bound certifies nothing is shaded, unless a
    file is of the bound `two_class`.

    The evidences, from `proof.load`, stand by their labels; at least one file has evidence. Files without are left out,
    and keep their colours for the other figures. `path` is that of the PNG.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    styles = {label: line_style(place) for place, label in enumerate(evidences)}
    evidences = {label: evidence for label, evidence in evidences.items() if evidence is not None}
    ceilings = {ceiling(evidence) / evidence.settings.law.sigma for evidence in evidences.values()}
    known = {label: votes_for_label(evidence) for label, evidence in evidences.items()}
    estimates = {label: votes / evidences[label].votes for label, (votes, _) in known.items()}
    smallest = min(estimate.min() for estimate in estimates.values())  # a lower bound is smaller, and not by much
    left = special.ndtri(np.clip(smallest, _LEFTMOST, 0.45)) - 0.15
    one_less = max(special.ndtri(1 - 1 / evidence.votes.max()) for evidence in evidences.values())
    right = max(*ceilings, one_less) + 0.2
    for label, evidence in evidences.items():
        settings, estimate, style = evidence.settings, estimates[label], styles[label]
        hard, at_ceiling = np.mean(estimate < 0.5), np.mean(estimate == 1)
        _ecdf(axes, estimate, left, right, linewidth=0.8, **style)
        marked = {"markerfacecolor": "white", "markersize": 5, "color": style["color"], "clip_on": False, "zorder": 3}
        axes.plot(0, hard, marker="o", **marked)
        axes.plot(right, 1 - at_ceiling, marker="D", **marked)
        n = " to ".join(f"{votes:,}" for votes in np.unique([evidence.votes.min(), evidence.votes.max()]))
        legend = plain(f"{label}: hard {hard:.1%}, at the ceiling {at_ceiling:.1%}")
        legend += f"\nn = {n}, alpha = {settings.alpha:.3g}, {settings.bound}"
        _ecdf(axes, lower_of_label(evidence), left, right, linewidth=1.8, label=legend, **style)
    for each in ceilings:
        axes.axvline(each, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xlim=(left, right), ylim=(0, 1.01), ylabel="share of images with at most this p")
    ticks = [p for p in _TICKS if left <= special.ndtri(p) <= right]
    axes.set_xticks(special.ndtri(ticks), [f"{p:g}" for p in ticks], fontsize="small")
    explained, above = "bold: lower bound; thin: share of the votes; dotted: ceiling", "Phi^-1(p)"
    if all(evidence.settings.bound != "two_class" for evidence in evidences.values()):
        axes.axvspan(left, 0, color="0.93", zorder=0)
        explained, above = f"{explained}; shaded: no certificate", "radius / sigma"
    explained += "\ncircle: hard images, p < 1/2; diamond: images below the ceiling"
    if not all(known_votes.all() for _, known_votes in known.values()):
        explained += "\nwhere another class was selected, p is at most the drawn one"
    axes.set_xlabel(f"p of the true class\n{explained}")
    top = axes.secondary_xaxis("top", xlabel=above)
    top.set_xticks(np.arange(np.floor(right) + 1))  # to the left of 0 there is no radius
    axes.grid(alpha=0.3)
    legend_below(figure, *axes.get_legend_handles_labels(), room=2)
    save(figure, path)


def _ecdf(axes: Axes, p: np.ndarray, left: float, right: float, **style: Any) -> None:
    """Draw the share of p `[N]` that is at most x, over Phi^-1(x)."""
    x = np.sort(np.clip(special.ndtri(p), left, None))
    share = np.arange(len(x) + 1) / len(x)
    inside = x <= right  # Phi^-1(1) is infinite
    drawn = share[: inside.sum() + 1]
    axes.step(np.concatenate([[left], x[inside], [right]]), np.append(drawn, drawn[-1]), where="post", **style)


def short_labels(paths: Sequence[Path]) -> list[str]:
    """Return names that tell the paths apart: the paths without the folders and endings that they share.

    The second name of a path that is given twice ends in a number. Bytes that are no text are written as escapes.
    """
    short = [unpacked_path(path) for path in paths]
    short = [path.with_suffix("") if path.suffix == ".tsv" else path for path in short]
    short = [path.parent if path.name == "certificates" and path.parent.name else path for path in short]
    if len(set(short)) < len(short):  # two files of one folder
        short = list(paths)
    shared = Path(os.path.commonpath([str(path.absolute().parent) for path in short]))
    labels: list[str] = []
    for path in short:
        label = plain_text(str(path.absolute().relative_to(shared)))
        copies = [label, *(f"{label} ({number})" for number in range(2, len(short) + 1))]
        labels.append(next(name for name in copies if name not in labels))
    return labels
