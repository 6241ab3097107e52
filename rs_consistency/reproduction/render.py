"""Tables and pictures of reproduced results: text, Markdown, LaTeX, PNG, PDF; made from the results' folder alone."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.read import Certificates
from rs_consistency.common.files import write_text
from rs_consistency.report import formats
from rs_consistency.report.plots import plt, save, save_curves
from rs_consistency.reproduction.comparison import Pair, Row, groups_of, pairs_of, rows_of
from rs_consistency.reproduction.plan import chosen_here, not_available
from rs_consistency.reproduction.published import TRADEOFF, Published, table_of
from rs_consistency.reproduction.results import NOT_RECORDED, Result, read_results

_Cells = list[list[str]]
_Letters = Mapping[tuple[str, ...], str]  # of notes
_COMMIT_DIGITS = 10
_ORANGE, _COLOURS = "#D55E00", ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000")


def render(table_name: str, results: Path) -> str:
    """Write `table.md`, `table.tex` and the pictures of a table beside its results, and return it as text."""
    folder, table = results / table_name, table_of(table_name)
    found = read_results(folder)
    rows, pairs = rows_of(found, table), pairs_of(found)
    # A letter for every kind of notes: a, b, ..., z, aa, bb, ...
    kinds = filter(None, dict.fromkeys([row.first.deviations for row in rows] + [pair.notes for pair in pairs]))
    letters = {kind: chr(ord("a") + number % 26) * (1 + number // 26) for number, kind in enumerate(kinds)}
    cells, paired = _table(rows, letters), _paired(pairs, letters)
    notes = [f"({letter}) not as published: {', '.join(kind)}" for kind, letter in letters.items()]
    about = not_available(table_name), chosen_here(table_name, [one.method for one in found])
    notes += [*_made(found), *filter(None, about)]
    in_markdown, in_latex, in_text = (
        list(map(escape, notes)) for escape in (formats.markdown_text, formats.latex_text, formats.plain_text)
    )
    write_text(folder / "table.md", _document(cells, paired, in_markdown, formats.markdown, "  \n"))
    write_text(folder / "table.tex", _document(cells, paired, in_latex, formats.latex, "\n\n"))
    if table.lbds:
        _save_tradeoff(rows, letters, folder / "tradeoff.png")
    else:
        for sigma, some in itertools.groupby(groups_of(found), key=lambda group: group[0].sigma):
            save_curves(_curves(list(some), letters), folder / f"certified_accuracy_sigma{sigma:.2f}.png")
    return _document(cells, paired, in_text, formats.aligned, "\n") + f"\nwritten: {folder}"


def _made(results: Sequence[Result]) -> list[str]:
    """Return the devices and commits that made the cells, a line for each set of cells that share them."""
    cells: dict[str, list[str]] = {}
    for one in results:
        cells.setdefault(_places(one.made), []).append(one.name)
    if len(cells) == 1:
        return list(filter(None, cells))
    return [f"{', '.join(names)}: {places}" for places, names in cells.items() if places]


def _places(made: Mapping[str, Any]) -> str:
    """Return devices, commits and processors of the calls that made a cell; empty where none was recorded."""
    calls = [call for call in made.get("calls", []) if call["program"] == "train"]
    votes = [made.get("certified_with", {}), *made.get("continued_with", [])]
    parts = []
    for done, some in (("trained", calls), ("certified", votes)):
        places = dict.fromkeys(_place(call) for call in some if call)
        if places:
            parts.append(f"{done} on {' and on '.join(places)}")
    processors = {call.get("processor") or NOT_RECORDED for call in made.get("calls", [])} - {NOT_RECORDED}
    if processors:
        parts.append(f"processor {', '.join(sorted(processors))}")
    return "; ".join(parts)


def _place(call: Mapping[str, Any]) -> str:
    device, commit = (call.get(key) or NOT_RECORDED for key in ("device", "git_commit"))
    if commit != NOT_RECORDED:
        commit = commit[:_COMMIT_DIGITS] + (" (dirty)" if "dirty" in commit else "")
    return f"device {device}, at commit {commit}"


def _curves(groups: Sequence[Sequence[Result]], letters: _Letters) -> dict[str, Certificates]:
    """Return the lines of each group as one table, whose curve is the mean over the seeds, named as in the table."""
    curves: dict[str, Certificates] = {}
    numbers: Counter[str] = Counter()
    for group in groups:
        name = _lettered(group[0].method, group[0].deviations, letters)
        numbers[name] += 1  # 2 for as many images, but others
        columns = zip(*(one.certificates[:-1] for one in group), strict=True)
        label = name if numbers[name] == 1 else f"{name} {numbers[name]}"
        curves[label] = Certificates(*map(np.concatenate, columns), mode=CERTIFY.name)
    return curves


def _lettered(name: str, notes: tuple[str, ...], letters: _Letters) -> str:
    return f"{name} ({letters[notes]})" if notes in letters else name


def _table(rows: Sequence[Row], letters: _Letters) -> _Cells:
    """Return the table of methods, without the column of released files where there are none."""
    released = any(row.published and row.published.released is not None for row in rows)
    return formats.cells([_line(row, letters, released) for row in rows])


def _line(row: Row, letters: _Letters, released: bool) -> dict[str, str]:
    first, published = row.first, row.published or Published(None)
    other = published.deviation if published.reported is None else None  # of the released files
    return {
        "method": first.method if first.lbd is None else f"{first.method} (lbd {first.lbd:g})",
        "sigma": f"{first.sigma:.2f}",
        "ACR": _with_deviation(row.acr, row.deviation),
        "95 % over images": f"{row.interval.low:.4f} to {row.interval.high:.4f}",
        "reported": _with_deviation(published.reported, published.deviation),
        **({"released files": _with_deviation(published.released, other)} if released else {}),
        "difference": "-" if row.difference is None else f"{row.difference:+.4f}",
        "std. errors": "-" if row.errors_apart is None else f"{row.errors_apart:+.1f}",
        "accuracy": f"{row.accuracy:.4f}",
        "seeds": str(row.seeds),
        "images": f"{row.images:,}",
        "epochs": str(first.epochs),
        "note": letters.get(first.deviations, ""),
    }


def _paired(pairs: Sequence[Pair], letters: _Letters) -> _Cells:
    """Return the table of two methods on the same images."""
    return formats.cells(
        [
            {
                "sigma": f"{pair.sigma:.2f}",
                "method": pair.method,
                "minus": pair.baseline,
                "difference +- std. error": f"{pair.difference.mean:+.4f} +- {pair.difference.standard_error:.4f}",
                "95 % over images": f"{pair.difference.interval.low:+.4f} to {pair.difference.interval.high:+.4f}",
                "gained": f"{pair.difference.gained:,}",
                "lost": f"{pair.difference.lost:,}",
                "images": f"{pair.difference.images:,}",
                "seeds": str(pair.seeds),
                "note": letters.get(pair.notes, ""),
            }
            for pair in pairs
        ]
    )


def _with_deviation(value: float | None, deviation: float | None = None) -> str:
    return "-" if value is None else f"{value:.4f}" + ("" if deviation is None else f" +- {deviation:.4f}")


def _document(cells: _Cells, paired: _Cells, notes: Sequence[str], write: Callable[[_Cells], str], between: str) -> str:
    """Return the tables that have lines in one of the formats, with the notes below the first table."""
    tables = [write(lines) for lines in (cells, paired) if lines]
    tables.insert(1, between.join(notes) + "\n" if notes else "")
    return "\n".join(part for part in tables if part)


def _save_tradeoff(rows: Sequence[Row], letters: _Letters, path: Path) -> None:
    """Draw ACR and clean accuracy against the weight of the consistency term, measured and published.

    Each kind of settings has a line of its own, named by the letter of its note.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    weights = sorted(TRADEOFF)
    for number, (one, label) in enumerate(zip(axes, ("ACR", "accuracy of the smoothed classifier"), strict=True)):
        one.plot(weights, [TRADEOFF[lbd][number] for lbd in weights], "s--", color=_ORANGE, label="published")
        for colour, (name, some) in zip(itertools.cycle(_COLOURS), _lines(rows, letters).items(), strict=False):
            measured = [row.acr if number == 0 else row.accuracy for row in some]
            measured_at = [row.first.lbd for row in some]
            one.plot(measured_at, measured, "o-", color=colour, label=name)
            if number == 0:
                low = [max(0.0, row.acr - row.interval.low) for row in some]  # of equal radii, rounding can be negative
                high = [max(0.0, row.interval.high - row.acr) for row in some]
                one.errorbar(measured_at, measured, yerr=[low, high], fmt="none", color=colour, capsize=3)
        one.set(xlabel="weight of the consistency term (lbd)", ylabel=label, ylim=(0, None))
        one.grid(alpha=0.3)
    axes[0].legend()
    save(figure, path)


def _lines(rows: Sequence[Row], letters: _Letters) -> dict[str, list[Row]]:
    """Return the rows by settings: a line of the picture connects rows of the same settings."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_lettered("measured", row.first.deviations, letters), []).append(row)
    return lines
