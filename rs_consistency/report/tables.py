"""The tables of analyze.py: cells made from summaries, comparisons and records; `report.formats` writes them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.report.formats import cells

if TYPE_CHECKING:  # slow to import for scipy.stats, which most tables do not need
    from rs_consistency.report.contents import Comparison, Subject
    from rs_consistency.statistics.intervals import Interval

_RECORDED = ("dataset", "split", "model", "dtype", "checkpoint_step", "sigma", "n0", "n", "seed")
_TRAINED = (
    ("method", "method"),
    ("consistency.lbd", "lbd"),
    ("consistency.eta", "eta"),
    ("num_noise", "M"),
    ("num_epochs", "epochs"),
    ("batch_size", "batch size"),
    ("optimizer.lr", "learning rate"),
    ("seed", "training seed"),
)
_COMMIT_DIGITS = 12


def measures(summaries: Sequence[dict[str, Any]], intervals: "Sequence[Interval | None]" = ()) -> list[list[str]]:
    """Return ACR, accuracy, abstention and certified accuracies, a line for each of `measures.summarize`.

    The intervals are those of the ACR, None for a file without one. A column that is empty for all files is left out:
    intervals, the ACR with the bound `two_class`, and the mode where all is certificates. The last line is that of the
    best file at each radius, where `measures.best_at` knows it.
    """
    has_modes = any(summary["mode"] != CERTIFY.name for summary in summaries)
    has_two = any(summary["acr_two_class"] is not None for summary in summaries)
    lines = [
        {
            "path": summary["path"],
            **({"mode": _mode(summary)} if has_modes else {}),
            "images": str(summary["n_images"]),
            "ACR": _number(summary["acr"]),
            **({"95 % interval": _range(intervals[place], ".4f")} if intervals else {}),
            **({"ACR two-class": _number(summary["acr_two_class"])} if has_two else {}),
            "accuracy": _number(summary["accuracy"]),
            "abstention": _number(summary["abstention"]),
            **{f"r={radius}": _number(share, ".3f") for radius, share in summary["certified_accuracy"].items()},
        }
        for place, summary in enumerate(summaries)
    ]
    if are_compared(summaries):
        compared = [summary for summary in summaries if summary["mode"] == CERTIFY.name]
        known = {"path": "best", "images": str(compared[0]["n_images"])}
        known["accuracy"] = _number(max(summary["accuracy"] for summary in compared))
        for radius in compared[0]["best"]:
            share = max(summary["certified_accuracy"][radius] for summary in compared)
            known[f"r={radius}"] = _number(share, ".3f")
        lines.append({name: known.get(name, "-") for name in lines[0]})
    return cells(lines)


def are_compared(summaries: Sequence[dict[str, Any]]) -> bool:
    """Return whether the best file at each radius is known: all files of certificates are of the same images."""
    return any(is_best is not None for summary in summaries for is_best in summary["best"].values())


def notes(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the sentences that belong below the table of `measures`."""
    lines = []
    for summary in summaries:
        radii = ", ".join(radius for radius, is_best in summary["best"].items() if is_best)
        if radii:
            lines.append(f"best at r={radii}: {summary['path']}")
    lines += [f"not finished: {summary['path']}" for summary in summaries if summary.get("finished") is False]
    if any(summary["acr_two_class"] is not None for summary in summaries):
        lines.append(
            "ACR two-class: the same votes with the bound two_class. Quote one of the two ACRs, chosen before you look;"
            " they are not valid together at alpha."
        )
    return lines


def votes(summaries: Sequence[dict[str, Any]], clean_accuracies: Mapping[str, float] | None = None) -> list[list[str]]:
    """Return settings, statistics and cost of the votes, a line for each file with counts.

    The accuracies of networks on images without noise stand by the paths of the files; without any, the column is left
    out.
    """
    clean = clean_accuracies or {}
    return cells(
        [
            {
                "path": summary["path"],
                "sigma": f"{summary['sigma']:g}",
                "n": str(summary["n"]),
                "alpha": f"{summary['alpha']:.4g}",
                "bound": summary["bound"],
                "ceiling": _number(summary["radius_ceiling"]),
                "at ceiling": _number(summary["at_ceiling"]),
                "hard": _number(summary["hard"]),
                **({"clean accuracy": _number(clean.get(summary["path"]))} if clean else {}),
                "base accuracy": _number(summary["base_accuracy"]),
                "ACR at n/10": _number(summary["acr_at_tenth"]),
                "votes": str(summary["votes"]),
                "seconds": _number(summary["seconds"], ".1f"),
            }
            for summary in summaries
            if summary["n"]
        ]
    )


def joint(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return lower confidence bounds of the certified accuracy, from `joint.joint_statement`: two lines a file."""
    lines = []
    for summary in summaries:
        for of, wrong, key in (
            ("these images", f"<= {summary['wrong_at_most']}", "certified_accuracy_lower"),
            ("new images", "-", "population_accuracy_lower"),
        ):
            line = {"path": summary["path"], "lower bound for": of, "delta": f"{summary['delta']:g}"}
            line["wrong lines"] = wrong
            for radius, share in summary[key].items():
                # Rounded down. A counted share such as 0.83 may be a little less in binary, and must not become 0.829.
                exact = round(1000 * share, 6) if key == "certified_accuracy_lower" else 1000 * share
                line[f"r={radius}"] = f"{math.floor(exact) / 1000:.3f}"
            lines.append(line)
    return cells(lines)


def compared(comparisons: "Sequence[Comparison]") -> list[list[str]]:
    """Return ACR differences on common images, a line for each two files; the last columns name images."""
    return cells(
        [
            {
                "run": one.first,
                "minus": one.second,
                "images": str(one.difference.images),
                "ACR difference": f"{one.difference.mean:+.4f}",
                "standard error": f"{one.difference.standard_error:.4f}",
                "95 % interval": _range(one.difference.interval, "+.4f"),
                "gained": str(one.difference.gained),
                "lost": str(one.difference.lost),
                "gained most": ", ".join(str(one.images[place]) for place in one.gained()) or "-",
                "lost most": ", ".join(str(one.images[place]) for place in one.lost()) or "-",
            }
            for one in comparisons
        ]
    )


def attacked(subjects: "Sequence[Subject]") -> list[list[str]]:
    """Return certified radii beside the distances of attacks, a line for each file with attacks beside it."""
    lines = []
    for one in subjects:
        found = one.attacked()
        if not found:
            continue
        proven = np.array([each[:2] for each in found if math.isfinite(each[1])]).reshape(-1, 2)
        medians = np.median([*proven.T, proven[:, 1] - proven[:, 0]], axis=1) if len(proven) else [None] * 3
        lines.append(
            {
                "run": one.label,
                "certificates attacked": str(len(found)),
                "attacks proven": str(len(proven)),
                **dict(zip(("median radius", "median distance", "median gap"), map(_number, medians), strict=True)),
                "alarms": str(sum(alarm != "" for _, _, alarm in found)),
            }
        )
    return cells(lines)


def settings(subjects: "Sequence[Subject]") -> list[list[str]]:
    """Return how the files were made: a line for each setting that any file has, a column for each file.

    alpha and bound are the values that the radii follow from, also where the radii were recomputed.
    """
    known = [_told(one) for one in subjects]
    lines = [
        [name, *("-" if each[name] is None else str(each[name]) for each in known)]
        for name in known[0]
        if any(each[name] is not None for each in known)
    ]
    return [["setting", *(one.label for one in subjects)], *lines]


def _told(one: "Subject") -> dict[str, Any]:
    """Return the settings of a file by their names in the table, None for an unknown one."""
    recorded = {name: one.record.get(name) for name in (*_RECORDED, "alpha", "bound")}
    if one.evidence is not None:
        recorded |= {"alpha": f"{one.evidence.settings.alpha:.4g}", "bound": one.evidence.settings.bound}
    trained = {name: one.setting(key) for key, name in _TRAINED}
    code = one.record.get("git_commit")
    if isinstance(code, str):
        code = code[:_COMMIT_DIGITS] + (" (dirty)" if code.endswith("(dirty)") else "")
    return {"file": one.path, **recorded, **trained, "device": one.record.get("device"), "code": code}


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _mode(summary: dict[str, Any]) -> str:
    """Return the mode of a file, of decisions with their radius."""
    radius = summary["radius"]
    return summary["mode"] if radius is None else f"{summary['mode']} at {radius:g}"


def _range(interval: "Interval | None", form: str) -> str:
    return "-" if interval is None else f"{interval.low:{form}} to {interval.high:{form}}"
