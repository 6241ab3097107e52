"""Figures of a report: ACR, comparison, training, logit margins, images; `report.plots` has the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.measures import acr
from rs_consistency.report.contents import Comparison, Subject
from rs_consistency.report.plots import COLOURS, legend_below, line_style, plain, plt, save
from rs_consistency.statistics.bounds import ABSTAIN

if TYPE_CHECKING:  # JAX, slow to import, which most figures have no use for
    from rs_consistency.report.samples import Samples

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LEAST_BINS, _MOST_BINS = 16, 60
_NAME_WIDTH = 26  # characters of a label beside an axis
_IN_A_ROW = 3  # panels of comparisons
_CLASSES_SHOWN = 4  # with most votes
_BARS_WIDTH = 1.8  # in widths of a picture


def save_acr(subjects: Sequence[Subject], path: Path) -> None:
    """Draw the ACR of each subject with certificates, at least one, with its 95 % interval over images."""
    drawn = [(place, one) for place, one in enumerate(subjects) if one.certificates.mode == CERTIFY.name]
    names = [plain(one.label, _NAME_WIDTH) for _, one in drawn]
    row = max(0.5, 0.3 + 0.16 * max(name.count("\n") for name in names))  # inches
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + row * len(drawn)), layout="constrained")
    for height, (place, one) in enumerate(drawn):
        value = acr(one.certificates)
        low, high = one.interval or (value, value)
        error = [[max(value - low, 0)], [max(high - value, 0)]]
        style = {"marker": _marker(place), "color": line_style(place)["color"], "capsize": 4}
        axes.errorbar(value, height, xerr=error, **style)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(f"{value:.4f}", (value, height), **above)
    axes.set_yticks(range(len(drawn)), names)
    axes.set(xlabel="average certified radius (bar: 95 %, bootstrap over images)", ylim=(len(drawn) - 0.5, -0.8))
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def save_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw radius times correct of two subjects, a point for each common image and a panel for each comparison."""
    columns = min(_IN_A_ROW, len(comparisons))
    rows = -(-len(comparisons) // columns)
    size = max(3.4 * columns, 4.6), 3.9 * rows
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, one in zip(panels.flat, comparisons, strict=False):
        first, second = one.radii
        largest = max(one.radii.max() * 1.05, 0.1)
        axes.plot([0, largest], [0, largest], color="0.4", linewidth=0.8)
        for chosen, name, marker, colour in (
            (first > second, "gained", "^", COLOURS[0]),
            (first < second, "lost", "v", COLOURS[1]),
            (first == second, "equal", "o", "0.5"),
        ):
            style = {"s": 18, "alpha": 0.6, "linewidths": 0.6, "edgecolors": colour, "clip_on": False}
            face = colour if name == "gained" else "none"
            label = f"{name}: {chosen.sum()}"
            axes.scatter(second[chosen], first[chosen], marker=marker, facecolors=face, label=label, **style)
        axes.set(xlim=(0, largest), ylim=(0, largest), aspect="equal")
        ticks = MaxNLocator(5).tick_values(0, largest)
        axes.set(xticks=ticks[ticks <= largest], yticks=ticks[ticks <= largest])
        axes.set_xlabel("radius x correct of\n" + plain(one.second, _NAME_WIDTH))
        axes.set_ylabel("radius x correct of\n" + plain(one.first, _NAME_WIDTH))
        axes.grid(alpha=0.3)
        above = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.14), "ncols": 3, "frameon": False, "fontsize": 8}
        axes.legend(handletextpad=0.1, columnspacing=0.8, **above)
    for axes in panels.flat[len(comparisons) :]:
        axes.axis("off")
    save(figure, path)


def save_gained_lost(pictures: Sequence[tuple[Comparison, np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw the images that gained most and lost most, two rows for each comparison.

    Beside a comparison stand the images `[G, H, W, C]` of its `gained()` and `[L, H, W, C]` of its `lost()`, float32 in
    [0, 1].
    """
    columns = max(max(len(gained), len(lost)) for _, gained, lost in pictures)
    rows, size = 2 * len(pictures), (1.3 + 1.3 * columns, 1.75 * 2 * len(pictures))
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in panels.flat:
        axes.axis("off")
    lines = iter(panels)
    for one, *both in pictures:
        for name, places, images in zip(("gained", "lost"), (one.gained(), one.lost()), both, strict=True):
            line = next(lines)
            _beside(line[0], f"{name}\n{plain(one.first, 20)}\nminus\n{plain(one.second, 20)}")
            for axes, place, image in zip(line, places, images, strict=False):
                first, second = one.radii[:, place]
                _picture(axes, image)
                about = f"#{one.images[place]}, label {one.labels[place]}"
                axes.set_title(f"{about}\n{first:.2f} - {second:.2f}", fontsize=8)
            if not places:
                line[0].text(0.5, 0.5, "none", ha="center", va="center", fontsize=8, transform=line[0].transAxes)
    save(figure, path)


def save_attacks(subjects: Sequence[Subject], path: Path) -> None:
    """Draw certified radius and distance of the attack of each attacked image, a panel for each run with attacks."""
    panels_of = [(one.label, one.attacked()) for one in subjects if one.attacked()]
    size = 6.4, 0.5 + 2.7 * len(panels_of)
    figure, panels = plt.subplots(len(panels_of), 1, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, (label, found) in zip(panels[:, 0], panels_of, strict=True):
        radius, distance, alarm = (np.array(column) for column in zip(*sorted(found), strict=True))
        place, proven, inside = np.arange(len(radius)), np.isfinite(distance), alarm != ""
        axes.vlines(place[proven], radius[proven], distance[proven], color="0.75", linewidth=0.8)
        style = {"linestyle": "none", "markersize": 4}
        axes.plot(place, radius, marker="o", color=COLOURS[0], label="certified radius", **style)
        good = proven & ~inside
        axes.plot(
            place[good], distance[good], marker="v", markerfacecolor="none", color=COLOURS[1], label="attack", **style
        )
        if inside.any():
            about = {**style, "markersize": 8, "label": f"ALARM: {inside.sum()} attacks contradict a certificate"}
            axes.plot(place[inside], np.where(proven, distance, 0)[inside], marker="X", color="red", **about)
        title = f"{plain(label)}: {len(found)} images"
        if (~proven).any():
            title += f", {(~proven).sum()} without a proven attack"
        axes.set(ylabel="l2 distance", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "frameon": False, "alignment": "left"}
        axes.legend(title=title, title_fontsize=10, fontsize=8, borderaxespad=0.2, handletextpad=0.3, **above)
    panels[-1, 0].set_xlabel("images, by their certified radius")
    save(figure, path)


def save_training(subjects: Sequence[Subject], path: Path) -> None:
    """Draw loss and accuracy on noisy test images by epoch, a curve for each run's folder."""
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
                style = line_style(place) | {"marker": _marker(place) if len(points) < 20 else None, "markersize": 4}
                (handles[plain(one.label)],) = axes.plot(*zip(*points, strict=True), **style)
    for axes, name in zip(panels, names.values(), strict=True):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if handles:
        columns = min(3, len(handles), max(1, 90 // (8 + max(map(len, handles)))))  # as many as have room
        legend_below(figure, list(handles.values()), list(handles), room=2, columns=columns)
    save(figure, path)


def save_margins(samples: "Mapping[str, Samples]", path: Path) -> None:
    """Draw histograms of the logit margin of clean and noisy images, a panel for each run, on common axes."""
    rows, size = len(samples), (6.4, 1 + 2.7 * len(samples))
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(rows, 1, figsize=size, layout="constrained", **shared)
    everything = [values.ravel() for one in samples.values() for values in (one.clean_margins, one.noisy_margins)]
    low, high = np.quantile(np.concatenate(everything), [0.001, 0.999])
    number = int(np.clip(2 * np.sqrt(min(map(len, everything))), _LEAST_BINS, _MOST_BINS))
    bins = np.linspace(min(low, -1), max(high, 1), number + 1)  # values outside are drawn at the ends
    filled = {"histtype": "stepfilled", "facecolor": COLOURS[5], "edgecolor": "0.35", "hatch": "////", "alpha": 0.6}
    line = {"histtype": "step", "color": "black", "linewidth": 1.6}
    for axes, (label, one) in zip(panels[:, 0], samples.items(), strict=True):
        within = f"\namong copies of an image: deviation {one.within():.2f}"
        noisy = (one.noisy_margins, f"noisy, sigma {one.sigma:g}", within, filled)
        for values, name, more, style in (noisy, (one.clean_margins, "clean", "", line)):
            text = f"{name}: mean {values.mean():.2f}, deviation {values.std():.2f}, wrong {np.mean(values < 0):.1%}"
            inside = np.clip(values.ravel(), bins[0], bins[-1])
            axes.hist(inside, bins=bins, density=True, label=text + more, **style)
        axes.axvline(0, color="0.2", linewidth=0.8, linestyle=":")
        axes.set(ylabel="density")
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "alignment": "left", "fontsize": 8}
        axes.legend(title=plain(label), title_fontsize=10, borderaxespad=0.2, **above)
    panels[-1, 0].set_xlabel("logit margin: true class minus the largest other one")
    save(figure, path)


def save_strip(label: str, one: "Samples", path: Path) -> None:
    """Draw the least and the most robust images, noisy copies of each with their classes, and the votes.

    Pixels of noisy copies outside [0, 1] are drawn as 0 or 1.
    """
    rows, copies = one.copies.shape[:2]
    widths = [1.0] * (1 + copies) + [_BARS_WIDTH]
    size = 1.1 * sum(widths) + 0.6, 1.28 * rows + 0.6
    grid = {"width_ratios": widths, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(rows, copies + 2, figsize=size, **grid)
    for row, (image, *noisy, bars) in enumerate(panels):
        certified = one.predictions[row]
        verdict = "abstains" if certified == ABSTAIN else f"class {certified}, radius {one.radii[row]:.2f}"
        kind = "least" if row < one.least else "most"
        _picture(image, one.images[row])
        _beside(image, f"{kind} robust\n#{one.shown[row]}, label {one.labels[row]}\n{verdict}")
        for axes, pixels, number in zip(noisy, one.copies[row], one.classes[row], strict=True):
            _picture(axes, np.clip(pixels, 0, 1))
            axes.set_title(f"{'' if number == one.labels[row] else 'wrong: '}{number}", fontsize=8)
        _bars(bars, one.votes[row], int(one.labels[row]))
    panels[0, 0].set_title("image", fontsize=8)
    panels[0, -1].set_title(f"share of {one.votes[0].sum()} votes", fontsize=8)
    figure.suptitle(f"{plain(label)}, noise of sigma {one.sigma:g}", fontsize=10)
    save(figure, path)


def _bars(axes: Axes, votes: np.ndarray, label: int) -> None:
    """Draw the shares of the classes with most votes, filled for the label and hatched for the others."""
    order = [number for number in np.argsort(-votes, kind="stable")[:_CLASSES_SHOWN] if votes[number]]
    for place, number in enumerate(order):
        share = votes[number] / votes.sum()
        style: dict[str, Any] = {"facecolor": "0.85", "hatch": "///", "edgecolor": "0.5"}
        axes.barh(place, share, **({"color": COLOURS[2]} if number == label else style))
        axes.text(1.04, place, _percent(share), ha="left", va="center", fontsize=7)
    axes.set_yticks(range(len(order)), [str(number) for number in order], fontsize=7)
    axes.set(xlim=(0, 1.3), ylim=(_CLASSES_SHOWN - 0.4, -0.6))
    axes.set(xticks=[], box_aspect=1 / _BARS_WIDTH)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _percent(share: float) -> str:
    """Return a share above 0 in whole per cent; only shares of 0 and 1 become 0 and 100."""
    return "<1%" if share < 0.005 else ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _marker(place: int) -> str:
    return _MARKERS[place % len(_MARKERS)]


def _beside(axes: Axes, text: str) -> None:
    """Write text to the left of a picture."""
    axes.annotate(text, (-0.1, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=8)


def _picture(axes: Axes, image: np.ndarray) -> None:
    """Draw an image `[H, W, C]` of floats in [0, 1]; a `ValueError` for other pixels, such as stored ones in 0..255."""
    if not np.issubdtype(image.dtype, np.floating) or image.min() < 0 or image.max() > 1:
        pixels = f"{image.dtype} pixels from {image.min():g} to {image.max():g}"
        raise ValueError(f"{pixels} cannot be drawn: give floats in [0, 1], such as `samples.read_images` returns")
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])  # the layout measures them even where they are not drawn
    axes.axis("off")
