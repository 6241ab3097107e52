"""Tables and pictures of reproduced results: text, Markdown, LaTeX, PNG, PDF; from the results' folder alone."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rs_consistency import formats
from rs_consistency.files import write_text
from rs_consistency.plots import plt, save, save_curves
from rs_consistency.reproduction.comparison import Pair, Row, pairs_of, rows_of, together
from rs_consistency.reproduction.published import TRADEOFF, table_of
from rs_consistency.reproduction.results import read_results

_Cells = list[list[str]]
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_HEAD = ["method", "sigma", "ACR", "95 % over images", "published", "difference", "std. errors", "accuracy", "seeds",
         "images", "epochs", "note"]  # fmt: skip
_PAIR_HEAD = ["sigma", "method", "minus", "difference", "95 %", "gained", "lost", "images", "seeds"]


def render(table_name: str, results: Path) -> str:
    """Writes `table.md`, `table.tex` and the pictures of a table beside its results.

    Args:
      table_name: a key of `published.TABLES`.
      results: folder of all tables.

    Returns:
      The table as text, for people.

    Raises:
      UserError: when there are no results of it.
    """
    folder, table = results / table_name, table_of(table_name)
    found = read_results(folder)
    rows, pairs = rows_of(found, table), pairs_of(found)
    cells, notes = _table(rows)
    paired = _paired(pairs)
    escaped = [formats.latex_text(one) for one in notes]
    write_text(folder / "table.md", _document(cells, paired, notes, formats.markdown, "  \n"))
    write_text(folder / "table.tex", _document(cells, paired, escaped, formats.latex, "\n\n"))
    if table.lbds:
        _save_tradeoff(rows, folder / "tradeoff.png")
    else:
        for sigma, group in itertools.groupby(found, key=lambda one: one.sigma):
            by_method = {name: list(runs) for name, runs in itertools.groupby(group, key=lambda one: one.method)}
            curves = {name: together(runs) for name, runs in by_method.items()}
            save_curves(curves, folder / f"certified_accuracy_sigma{sigma:.2f}.png")
    return _document(cells, paired, notes, formats.aligned, "\n") + f"\nwritten: {folder}"


def _table(rows: Sequence[Row]) -> tuple[_Cells, list[str]]:
    """Header and lines, and the notes that they refer to."""
    kinds = list(dict.fromkeys(row.notes for row in rows if row.notes))
    letters = {kind: chr(ord("a") + number) for number, kind in enumerate(kinds)}
    lines = [_HEAD]
    for row in rows:
        name = row.method if row.lbd is None else f"{row.method} (lbd {row.lbd:g})"
        lines.append([
            name, f"{row.sigma:.2f}", _with_deviation(row.acr, row.deviation),
            f"{row.interval.low:.4f} to {row.interval.high:.4f}",
            "-" if row.published is None else _with_deviation(row.published.acr, row.published.deviation),
            "-" if row.difference is None else f"{row.difference:+.4f}",
            "-" if row.errors_apart is None else f"{row.errors_apart:+.1f}",
            f"{row.accuracy:.4f}", str(row.seeds), f"{row.images:,}", str(row.epochs), letters.get(row.notes, ""),
        ])  # fmt: skip
    notes = [f"({letter}) not as published: {', '.join(kind)}" for kind, letter in letters.items()]
    return lines, notes


def _paired(pairs: Sequence[Pair]) -> _Cells:
    lines = [_PAIR_HEAD]
    for pair in pairs:
        found = pair.difference
        lines.append([
            f"{pair.sigma:.2f}", pair.method, pair.baseline, f"{found.mean:+.4f} +- {found.standard_error:.4f}",
            f"{found.interval.low:+.4f} to {found.interval.high:+.4f}", f"{found.gained:,}", f"{found.lost:,}",
            f"{found.images:,}", str(pair.seeds),
        ])  # fmt: skip
    return lines


def _with_deviation(value: float, deviation: float | None) -> str:
    return f"{value:.4f}" + ("" if deviation is None else f" +- {deviation:.4f}")


def _document(cells: _Cells, paired: _Cells, notes: Sequence[str], write: Callable[[_Cells], str], between: str) -> str:
    """The tables that have lines, with the notes below the first, in one of the formats."""
    tables = [write(lines) for lines in (cells, paired) if len(lines) > 1]
    tables.insert(1, between.join(notes) + "\n" if notes else "")
    return "\n".join(part for part in tables if part)


def _save_tradeoff(rows: Sequence[Row], path: Path) -> None:
    """ACR and clean accuracy against the weight of the consistency term, measured and published."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    weights = sorted(TRADEOFF)
    for number, (one, label) in enumerate(zip(axes, ("ACR", "accuracy of the smoothed classifier"), strict=True)):
        one.plot(weights, [TRADEOFF[lbd][number] for lbd in weights], "s--", color=_ORANGE, label="published")
        measured = [row.acr if number == 0 else row.accuracy for row in rows]
        one.plot([row.lbd for row in rows], measured, "o-", color=_BLUE, label="measured")
        if number == 0:
            low = [row.acr - row.interval.low for row in rows]
            high = [row.interval.high - row.acr for row in rows]
            one.errorbar([row.lbd for row in rows], measured, yerr=[low, high], fmt="none", color=_BLUE, capsize=3)
        one.set(xlabel="weight of the consistency term (lbd)", ylabel=label, ylim=(0, None))
        one.grid(alpha=0.3)
    axes[0].legend()
    save(figure, path)
