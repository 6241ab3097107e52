"""Figures of a report: ACR, comparison, training, logit margins, images; `report.plots` has the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from rs_consistency.certificates.measures import acr
from rs_consistency.report.contents import Comparison, Subject
from rs_consistency.report.plots import COLOURS, STYLES, plain, plt, save
from rs_consistency.statistics.bounds import ABSTAIN

if TYPE_CHECKING:  # JAX, slow to import, which most figures have no use for
    from rs_consistency.report.samples import Samples

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LEAST_BINS, _MOST_BINS = 16, 60
_NAME_WIDTH = 26  # characters of a label beside an axis
_IN_A_ROW = 3  # panels of comparisons
_CLASSES_SHOWN = 4  # with most votes


def save_acr(subjects: Sequence[Subject], path: Path) -> None:
    """ACR of each subject, with its 95 % interval over images."""
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.5 * len(subjects)), layout="constrained")
    for place, one in enumerate(subjects):
        value = acr(one.certificates)
        low, high = one.interval or (value, value)
        axes.errorbar(
            value,
            place,
            xerr=[[max(value - low, 0)], [max(high - value, 0)]],
            fmt=_MARKERS[place % len(_MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            capsize=4,
        )
        axes.annotate(
            f"{value:.4f}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_yticks(range(len(subjects)), [plain(one.label, _NAME_WIDTH) for one in subjects])
    axes.set(xlabel="average certified radius (bar: 95 %, bootstrap over images)", ylim=(len(subjects) - 0.5, -0.8))
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def save_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Radius times correct of two subjects, a point for each common image and a panel for each comparison."""
    columns = min(_IN_A_ROW, len(comparisons))
    rows = -(-len(comparisons) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(3.4 * columns, 4.6), 3.9 * rows), squeeze=False, layout="constrained"
    )
    for axes, one in zip(panels.flat, comparisons, strict=False):
        first, second = one.radii
        largest = max(one.radii.max() * 1.05, 0.1)
        axes.plot([0, largest], [0, largest], color="0.4", linewidth=0.8)
        for chosen, name, marker, colour in (
            (first > second, "gained", "^", COLOURS[0]),
            (first < second, "lost", "v", COLOURS[1]),
            (first == second, "equal", "o", "0.5"),
        ):
            axes.scatter(
                second[chosen],
                first[chosen],
                marker=marker,
                s=18,
                alpha=0.6,
                linewidths=0.6,
                edgecolors=colour,
                facecolors=colour if name == "gained" else "none",
                label=f"{name}: {chosen.sum()}",
                clip_on=False,
            )
        axes.set(xlim=(0, largest), ylim=(0, largest), aspect="equal")
        axes.set_xlabel("radius x correct of\n" + plain(one.second, _NAME_WIDTH))
        axes.set_ylabel("radius x correct of\n" + plain(one.first, _NAME_WIDTH))
        axes.grid(alpha=0.3)
        axes.legend(
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, 1.14),
            ncols=3,
            frameon=False,
            handletextpad=0.1,
            columnspacing=0.8,
        )
    for axes in panels.flat[len(comparisons) :]:
        axes.axis("off")
    save(figure, path)


def save_gained_lost(pictures: Sequence[tuple[Comparison, np.ndarray, np.ndarray]], path: Path) -> None:
    """The images that gained most and lost most, two rows for each comparison.

    Args:
      pictures: comparisons, with the images `[G, H, W, C]` of `gained()` and `[L, H, W, C]` of `lost()`.
      path: of the PNG.
    """
    columns = max(max(len(gained), len(lost)) for _, gained, lost in pictures)
    figure, panels = plt.subplots(
        2 * len(pictures),
        columns,
        figsize=(1 + 1.3 * columns, 1.75 * 2 * len(pictures)),
        squeeze=False,
        layout="constrained",
    )
    for row, (one, gained, lost) in enumerate(pictures):
        for offset, name, places, images in ((0, "gained", one.gained(), gained), (1, "lost", one.lost(), lost)):
            line = panels[2 * row + offset]
            line[0].annotate(
                f"{name}\n{plain(one.first, 16)}\nminus\n{plain(one.second, 16)}",
                (-0.12, 0.5),
                xycoords="axes fraction",
                ha="right",
                va="center",
                fontsize=8,
            )
            for axes in line:
                axes.axis("off")
            for axes, place, image in zip(line, places, images, strict=False):
                first, second = one.radii[:, place]
                _picture(axes, image)
                about = f"#{one.images[place]}, label {one.labels[place]}"
                axes.set_title(f"{about}\n{first:.2f} - {second:.2f}", fontsize=8)
            if not places:
                line[0].text(0.5, 0.5, "none", ha="center", va="center", fontsize=8, transform=line[0].transAxes)
    save(figure, path)


def save_training(subjects: Sequence[Subject], path: Path) -> None:
    """Loss and accuracy on noisy test images by epoch, a curve for each run's folder."""
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 3.3), layout="constrained")
    names = {"loss": "loss (sum of its terms)", "noisy_test_accuracy": "accuracy on noisy test images"}
    handles, drawn = {}, set()
    for place, one in enumerate(subjects):
        if not one.metrics or one.workdir in drawn:  # several files may be of one run
            continue
        drawn.add(one.workdir)
        for axes, key in zip(panels, names, strict=True):
            points = [(line["epoch"], line[key]) for line in one.metrics if isinstance(line.get(key), int | float)]
            if points:
                marker = _MARKERS[place % len(_MARKERS)] if len(points) < 20 else None
                (handles[plain(one.label)],) = axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[place % len(COLOURS)],
                    marker=marker,
                    markersize=4,
                    linestyle=STYLES[place % len(STYLES)],
                )
    for axes, name in zip(panels, names.values(), strict=True):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    save(figure, path)


def save_margins(samples: "Mapping[str, Samples]", path: Path) -> None:
    """Histograms of the logit margin of clean and noisy images, a panel for each run, on common axes."""
    figure, panels = plt.subplots(
        len(samples),
        1,
        figsize=(6.4, 1 + 2.3 * len(samples)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    everything = [values.ravel() for one in samples.values() for values in (one.clean_margins, one.noisy_margins)]
    low, high = np.quantile(np.concatenate(everything), [0.001, 0.999])
    number = int(np.clip(2 * np.sqrt(max(map(len, everything))), _LEAST_BINS, _MOST_BINS))
    bins = np.linspace(min(low, -1), max(high, 1), number + 1)  # what lies outside is drawn at the ends
    for axes, (label, one) in zip(panels[:, 0], samples.items(), strict=True):
        for values, name, style in (
            (
                one.noisy_margins.ravel(),
                f"noisy, sigma {one.sigma:g}",
                {"histtype": "stepfilled", "facecolor": COLOURS[5], "edgecolor": "0.35", "hatch": "////", "alpha": 0.6},
            ),
            (one.clean_margins, "clean", {"histtype": "step", "color": "black", "linewidth": 1.6}),
        ):
            told = f"{name}: mean {values.mean():.2f}, deviation {values.std():.2f}, wrong {np.mean(values < 0):.1%}"
            told += f"\namong copies of an image: deviation {one.within():.2f}" if name != "clean" else ""
            axes.hist(np.clip(values, bins[0], bins[-1]), bins=bins, density=True, label=told, **style)
        axes.axvline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set(ylabel="density")
        axes.set_title(plain(label), fontsize=10)
        axes.legend(fontsize=8, loc="upper left")
    top = max(axes.get_ylim()[1] for axes in panels[:, 0])
    panels[0, 0].set_ylim(0, 1.3 * top)  # room for the legends
    panels[-1, 0].set_xlabel("logit margin: true class minus the largest other one")
    save(figure, path)


def save_strip(label: str, one: "Samples", path: Path) -> None:
    """The least and the most robust images, noisy copies of each with their classes, and the votes."""
    rows, copies = one.copies.shape[:2]
    widths = [1.0] * (1 + copies) + [1.8]
    figure, panels = plt.subplots(
        rows,
        copies + 2,
        figsize=(1.1 * sum(widths) + 0.6, 1.28 * rows + 0.6),
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for row in range(rows):
        certified = one.predictions[row]
        verdict = "abstains" if certified == ABSTAIN else f"class {certified}, radius {one.radii[row]:.2f}"
        kind = "least" if row < one.least else "most"
        _picture(panels[row, 0], one.images[row])
        panels[row, 0].annotate(
            f"{kind} robust\n#{one.shown[row]}, label {one.labels[row]}\n{verdict}",
            (-0.1, 0.5),
            xycoords="axes fraction",
            ha="right",
            va="center",
            fontsize=8,
        )
        for copy in range(copies):
            _picture(panels[row, 1 + copy], one.copies[row, copy])
            right = one.classes[row, copy] == one.labels[row]
            panels[row, 1 + copy].set_title(f"{'' if right else 'wrong: '}{one.classes[row, copy]}", fontsize=8)
        _bars(panels[row, -1], one.votes[row], int(one.labels[row]))
    panels[0, 0].set_title("image", fontsize=8)
    panels[0, -1].set_title(f"share of {one.votes[0].sum()} votes", fontsize=8)
    figure.suptitle(f"{plain(label)}, noise of sigma {one.sigma:g}", fontsize=10)
    save(figure, path)


def _bars(axes: Axes, votes: np.ndarray, label: int) -> None:
    """The shares of the classes with most votes; that of the label is filled, the others hatched."""
    order = [number for number in np.argsort(-votes, kind="stable")[:_CLASSES_SHOWN] if votes[number]]
    for place, number in enumerate(order):
        share = votes[number] / votes.sum()
        style = {"color": COLOURS[2]} if number == label else {"facecolor": "0.85", "hatch": "///", "edgecolor": "0.5"}
        axes.barh(place, share, **style)
        axes.text(1.04, place, _percent(share), ha="left", va="center", fontsize=7)
    axes.set_yticks(range(len(order)), [str(number) for number in order], fontsize=7)
    axes.set(xlim=(0, 1.3), ylim=(_CLASSES_SHOWN - 0.4, -0.6))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _percent(share: float) -> str:
    """A share above 0 in whole per cent, which neither 0 nor 100 stands for."""
    return "<1%" if share < 0.005 else ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _picture(axes: Axes, image: np.ndarray) -> None:
    """An image `[H, W, C]`, what lies outside [0, 1] cut off."""
    grey = image.shape[-1] == 1
    axes.imshow(np.clip(image[..., 0] if grey else image, 0, 1), cmap="gray" if grey else None, vmin=0, vmax=1)
    axes.axis("off")
