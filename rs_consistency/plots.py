"""Pictures of certificates."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from rs_consistency.analysis import Certificates, acr
from rs_consistency.files import replace_atomically

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision; line styles tell them apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":")


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


def short_labels(paths: Sequence[Path]) -> list[str]:
    """Names that tell the paths apart: what is left of them without the folders and endings that they share."""
    plain = [path.with_suffix("") if path.suffix == ".tsv" else path for path in paths]
    plain = [path.parent if path.name == "certificates" and path.parent.name else path for path in plain]
    if len(set(plain)) < len(plain):  # two files of one folder
        plain = list(paths)
    parents = [str(path.absolute().parent) for path in plain]
    shared = Path(os.path.commonpath(parents))
    return [str(path.absolute().relative_to(shared)) for path in plain]
