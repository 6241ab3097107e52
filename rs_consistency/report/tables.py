"""The tables of analyze.py: lines of text from summaries, comparisons and records; see `report.formats`."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # scipy.stats is slow to import, which most tables have no use for
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
_COMMIT = 12  # characters of a commit


def measures(summaries: Sequence[dict[str, Any]], intervals: "Sequence[Interval | None]" = ()) -> list[list[str]]:
    """ACR, accuracy, abstention and certified accuracies, a line for each file.

    Args:
      summaries: from `measures.summarize`.
      intervals: of the ACR, one for each file, None where there is none; empty for a table without them.
    """
    header = ["path", "images", "ACR", *(["95 % interval"] if intervals else []), "accuracy", "abstention"]
    lines = [[*header, *(f"r={radius}" for radius in summaries[0]["certified_accuracy"])]]
    for place, summary in enumerate(summaries):
        lines.append(
            [
                summary["path"],
                str(summary["n_images"]),
                f"{summary['acr']:.4f}",
                *([_range(intervals[place], ".4f")] if intervals else []),
                f"{summary['accuracy']:.4f}",
                f"{summary['abstention']:.4f}",
                *(f"{share:.3f}" for share in summary["certified_accuracy"].values()),
            ]
        )
    return lines


def votes(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the votes allow, and what they said; files without counts are left out, of which there is one without."""
    shares = list(summaries[0]["p_a"])[:3]  # the low ones: the others are close to 1
    header = ["path", "sigma", "n", "alpha", "bound", "ceiling", "at ceiling"]
    lines = [
        [
            summary["path"],
            f"{summary['sigma']:g}",
            str(summary["n"]),
            f"{summary['alpha']:.4g}",
            summary["bound"],
            f"{summary['radius_ceiling']:.4f}",
            f"{summary['at_ceiling']:.4f}",
            *(f"{summary['p_a'][share]:.4f}" for share in shares),
        ]
        for summary in summaries
        if summary["n"]
    ]
    return [[*header, *(f"p_A {float(share):.0%}" for share in shares)], *lines]


def joint(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lower confidence bounds of the certified accuracy, two lines for each file; from `joint.joint_statement`."""
    radii = (f"r={radius}" for radius in summaries[0]["certified_accuracy"])
    lines = [["path", "lower bound for", "delta", "wrong lines", *radii]]
    for summary in summaries:
        for of, wrong, key in (
            ("these images", f"<= {summary['wrong_at_most']}", "certified_accuracy_lower"),
            ("new images", "-", "population_accuracy_lower"),
        ):
            # Rounded down; 0.829 for a counted 0.83, which is a little less in binary, would be too much of that.
            exact = [1000 * share for share in summary[key].values()]
            whole = [round(share, 6) if key == "certified_accuracy_lower" else share for share in exact]
            shares = (f"{math.floor(share) / 1000:.3f}" for share in whole)
            lines.append([summary["path"], of, f"{summary['delta']:g}", wrong, *shares])
    return lines


def compared(comparisons: "Sequence[Comparison]") -> list[list[str]]:
    """ACR differences on common images, a line for each two files; the last columns name images."""
    lines = [
        [
            "run",
            "minus",
            "images",
            "ACR difference",
            "standard error",
            "95 % interval",
            "gained",
            "lost",
            "gained most",
            "lost most",
        ]
    ]
    for one in comparisons:
        found = one.difference
        lines.append(
            [
                one.first,
                one.second,
                str(found.images),
                f"{found.mean:+.4f}",
                f"{found.standard_error:.4f}",
                _range(found.interval, "+.4f"),
                str(found.gained),
                str(found.lost),
                ", ".join(str(one.images[place]) for place in one.gained()) or "-",
                ", ".join(str(one.images[place]) for place in one.lost()) or "-",
            ]
        )
    return lines


def settings(subjects: "Sequence[Subject]") -> list[list[str]]:
    """How the files were made: a line for each setting that any of them tells, a column for each file.

    alpha and bound are those that the radii follow from: recomputed ones, where they were recomputed.
    """
    names = ["file", *_RECORDED, "alpha", "bound", *(name for _, name in _TRAINED), "device", "code"]
    told = [_told(one) for one in subjects]
    lines = [
        [name, *("-" if each.get(name) is None else str(each[name]) for each in told)]
        for name in names
        if any(each.get(name) is not None for each in told)
    ]
    return [["setting", *(one.label for one in subjects)], *lines]


def _told(one: "Subject") -> dict[str, Any]:
    """What is known of a file's making, by the names in the table."""
    told: dict[str, Any] = {"file": one.path}
    told |= {name: one.record.get(name) for name in (*_RECORDED, "alpha", "bound", "device")}
    told |= {name: _inside(one.config, key) for key, name in _TRAINED}
    commit = one.record.get("git_commit")
    if isinstance(commit, str):
        told["code"] = commit[:_COMMIT] + (" (dirty)" if commit.endswith("(dirty)") else "")
    if one.evidence is not None:
        told |= {"alpha": f"{one.evidence.settings.alpha:.4g}", "bound": one.evidence.settings.bound}
    return told


def _inside(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _range(interval: "Interval | None", form: str) -> str:
    return "-" if interval is None else f"{interval.low:{form}} to {interval.high:{form}}"
