"""Pictures of certificates."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from scipy import special

from rs_consistency.analysis import Certificates, acr
from rs_consistency.bounds import radius_ceiling
from rs_consistency.files import replace_atomically
from rs_consistency.reanalysis import Evidence

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision; line styles tell them apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":")
_TICKS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.9999999)  # as many as have space
_LEFTMOST = 0.01  # what has a smaller p_A is far from any certificate, and drawn as if it were here


def save_curves(tables: Mapping[str, Certificates], path: Path) -> None:
    """Draws certified accuracy against radius, one curve for each table, as PNG.

    Args:
      tables: label -> certificates; see `short_labels`.
      path: of the PNG; replaced if it exists.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for i, (label, table) in enumerate(tables.items()):
        radii = np.sort(table.radius[table.correct == 1])
        # Certified accuracy is constant up to the next radius and drops behind it.
        left = np.arange(len(radii), -1, -1) / len(table.radius)
        axes.step(
            np.concatenate([[0.0], radii]),
            left,
            where="post",
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_STYLES[i % len(_STYLES)],
            label=f"{label}: ACR {acr(table):.3f}, {len(table.idx)} images",
        )
    axes.set(xlabel="l2 radius", ylabel="certified accuracy", ylim=(0, 1.01))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def save_p_a(evidences: Mapping[str, Evidence], path: Path) -> None:
    """Draws the distribution of p_A over the images, one empirical distribution function for each file, as PNG.

    The axis is Phi^-1(p_A), the radius in units of sigma, since p_A itself is close to 1 for most images. Bold: the
    lower confidence bound, whose largest value, where all votes agree, is the ceiling. Thin: the estimate count / n,
    which shows what the confidence costs; it ends below 1 where images have all votes. Shaded, unless a file is of the
    bound `two_class`: where a lower bound means abstention.

    Args:
      evidences: label -> what `reanalysis.load` returns; see `short_labels`.
      path: of the PNG; replaced if it exists.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    ceilings = {
        float(radius_ceiling(settings.n, alpha=settings.alpha, sigma=1.0, bound=settings.bound))
        for settings in (evidence.settings for evidence in evidences.values())
    }
    estimates = {label: evidence.counts.count / evidence.settings.n for label, evidence in evidences.items()}
    smallest = min(min(estimates[label].min(), evidence.lower.min()) for label, evidence in evidences.items())
    left = special.ndtri(np.clip(smallest, _LEFTMOST, 0.45)) - 0.15
    right = max(ceilings) + 0.35
    for i, (label, evidence) in enumerate(evidences.items()):
        colour, style = _COLOURS[i % len(_COLOURS)], _STYLES[i % len(_STYLES)]
        _ecdf(axes, estimates[label], left, right, color=colour, linestyle=style, linewidth=0.8)
        settings = evidence.settings
        legend = f"{label}: n = {settings.n:,}, alpha = {settings.alpha:.3g}, {settings.bound}"
        _ecdf(axes, evidence.lower, left, right, color=colour, linestyle=style, linewidth=1.8, label=legend)
    for ceiling in ceilings:
        axes.axvline(ceiling, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xlim=(left, right), ylim=(0, 1.01), ylabel="share of images with at most this p_A")
    ticks = [p for p in _TICKS if left <= special.ndtri(p) <= right]
    axes.set_xticks(special.ndtri(ticks), [f"{p:g}" for p in ticks], fontsize="small")
    explained, above = "bold: lower bound; thin: count / n; dotted: ceiling", "Phi^-1(p_A)"
    if all(evidence.settings.bound != "two_class" for evidence in evidences.values()):
        axes.axvspan(left, 0, color="0.93", zorder=0)
        explained, above = f"{explained}; shaded: abstention", "radius / sigma"
    axes.set_xlabel(f"p_A\n{explained}")
    top = axes.secondary_xaxis("top", xlabel=above)
    top.set_xticks(np.arange(np.floor(right) + 1))  # to the left of 0 there is no radius
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _ecdf(axes: Axes, p: np.ndarray, left: float, right: float, **style: Any) -> None:
    """The share of p `[N]` that is at most x, over Phi^-1(x)."""
    x = np.sort(np.clip(special.ndtri(p), left, None))
    share = np.arange(len(x) + 1) / len(x)
    inside = x <= right  # Phi^-1(1) is infinite
    drawn = share[: inside.sum() + 1]
    axes.step(np.concatenate([[left], x[inside], [right]]), np.append(drawn, drawn[-1]), where="post", **style)


def short_labels(paths: Sequence[Path]) -> list[str]:
    """Names that tell the paths apart: what is left of them without the folders and endings that they share."""
    plain = [path.with_suffix("") if path.suffix == ".tsv" else path for path in paths]
    plain = [path.parent if path.name == "certificates" and path.parent.name else path for path in plain]
    if len(set(plain)) < len(plain):  # two files of one folder
        plain = list(paths)
    parents = [str(path.absolute().parent) for path in plain]
    shared = Path(os.path.commonpath(parents))
    return [str(path.absolute().relative_to(shared)) for path in plain]
