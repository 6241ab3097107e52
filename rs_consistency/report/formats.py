"""Tables as text: aligned for a terminal, Markdown, LaTeX, CSV.

A table is a list of lines of cells. The first line is the header. The first column holds names and is aligned to the
left, the others to the right.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

Cells = Sequence[Sequence[str]]

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        **{character: f"\\{character}" for character in "{}$%_#&"},
    }
)


def cells(records: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Return the table of records with the same keys, the keys as its header; an empty table for no records."""
    return [list(records[0]), *(list(record.values()) for record in records)] if records else []


def aligned(cells: Cells) -> str:
    """Return a table for a terminal, which ends with a newline."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        others = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines) + "\n"


def markdown(cells: Cells) -> str:
    """Return a Markdown table, which ends with a newline."""
    header, *rest = ([_one_line(cell).replace("|", r"\|") for cell in line] for line in cells)
    lines = [header, ["---", *("---:" for _ in header[1:])], *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(cells: Cells) -> str:
    """Return a LaTeX `tabular` with the rules of the package booktabs, which ends with a newline."""
    header, *rest = (" & ".join(map(latex_text, line)) + r" \\" for line in cells)
    columns = "l" + "r" * (len(cells[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *rest, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def latex_text(text: str) -> str:
    """Return LaTeX that prints the text as it is; `+-` becomes the sign."""
    return _one_line(text).translate(_LATEX).replace("+-", r"$\pm$")


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records with the same keys as CSV, in full precision.

    A map in a record becomes a column `NAME_KEY` for each of its keys. None becomes an empty cell.
    """
    flat = []
    for record in records:
        row: dict[str, Any] = {}
        for name, value in record.items():
            row |= {f"{name}_{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat.append(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, flat[0].keys() if flat else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _one_line(text: str) -> str:
    return " ".join(text.split())
