"""Tables as text: aligned for a terminal, Markdown, LaTeX, CSV.

A table is a list of lines of cells, the first of which is its header. The first column holds names and is aligned to
the left, the others to the right.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

Cells = Sequence[Sequence[str]]

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "&": r"\&",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def aligned(cells: Cells) -> str:
    """For a terminal; ends with a newline."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        others = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines) + "\n"


def markdown(cells: Cells) -> str:
    """A Markdown table; ends with a newline."""
    header, *rest = ([_one_line(cell).replace("|", r"\|") for cell in line] for line in cells)
    lines = [header, ["---", *("---:" for _ in header[1:])], *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(cells: Cells) -> str:
    """A LaTeX `tabular` with the rules of the package booktabs; ends with a newline."""
    header, *rest = (" & ".join(map(latex_text, line)) + r" \\" for line in cells)
    columns = "l" + "r" * (len(cells[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *rest, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is; `+-` becomes the sign."""
    return _one_line(text).translate(_LATEX).replace("+-", r"$\pm$")


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records with the same keys as CSV, in full precision; a map within one becomes a column `NAME_KEY` for each key.

    None is an empty cell.
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
