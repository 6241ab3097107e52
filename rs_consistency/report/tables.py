"""The tables of analyze.py: cells made from summaries, comparisons and records; `report.formats` writes them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

    The intervals are those of the ACR, None for a file without one. Without any, the column is left out.
    """
    return cells(
        [
            {
                "path": summary["path"],
                "images": str(summary["n_images"]),
                "ACR": f"{summary['acr']:.4f}",
                **({"95 % interval": _range(intervals[place], ".4f")} if intervals else {}),
                "accuracy": f"{summary['accuracy']:.4f}",
                "abstention": f"{summary['abstention']:.4f}",
                **{f"r={radius}": f"{share:.3f}" for radius, share in summary["certified_accuracy"].items()},
            }
            for place, summary in enumerate(summaries)
        ]
    )


def votes(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return settings of the votes, ceiling and quantiles of p_A, a line for each file with counts."""
    return cells(
        [
            {
                "path": summary["path"],
                "sigma": f"{summary['sigma']:g}",
                "n": str(summary["n"]),
                "alpha": f"{summary['alpha']:.4g}",
                "bound": summary["bound"],
                "ceiling": f"{summary['radius_ceiling']:.4f}",
                "at ceiling": f"{summary['at_ceiling']:.4f}",
                # The low quantiles: the others are close to 1.
                **{f"p_A {float(share):.0%}": f"{p:.4f}" for share, p in list(summary["p_a"].items())[:3]},
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


def _range(interval: "Interval | None", form: str) -> str:
    return "-" if interval is None else f"{interval.low:{form}} to {interval.high:{form}}"
