"""Tables as text: aligned for a terminal, Markdown, LaTeX, CSV.

A table is a list of lines of cells. The first line is the header. The first column holds names and is aligned to the
left, the others to the right.

Cells may hold names of folders, which hold any character: each function writes them as text of its own kind, in which
nothing is markup, a formula, or a command for the terminal.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

Cells = Sequence[Sequence[str]]

_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")  # inside of words, _ means itself
_FORMULA = ("=", "+", "-", "@")  # with which a spreadsheet takes a text for a formula
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
    cells = [list(map(plain_text, line)) for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        others = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines) + "\n"


def markdown(cells: Cells) -> str:
    """Return a Markdown table, which ends with a newline."""
    header, *rest = (list(map(markdown_text, line)) for line in cells)
    lines = [header, ["---", *("---:" for _ in header[1:])], *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(text: str) -> str:
    r"""Return Markdown that shows the text as it is.

    Example:
      >>> from rs_consistency.report.formats import markdown_text
      >>> print(markdown_text("runs/a_b/*<i>"))
      runs/a_b/\*\<i\>
    """
    return _MARKDOWN.sub(r"\\\g<0>", plain_text(text))


def latex(cells: Cells) -> str:
    """Return a LaTeX `tabular` with the rules of the package booktabs, which ends with a newline."""
    header, *rest = (" & ".join(map(latex_text, line)) + r" \\" for line in cells)
    columns = "l" + "r" * (len(cells[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *rest, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def latex_text(text: str) -> str:
    """Return LaTeX that prints the text as it is; `+-` becomes the sign."""
    return plain_text(text).translate(_LATEX).replace("+-", r"$\pm$")


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records with the same keys as CSV, in full precision.

    A map in a record becomes a column `NAME_KEY` for each of its keys. None becomes an empty cell. A text that a
    spreadsheet would take for a formula gets a quote in front.
    """
    flat = []
    for record in records:
        row: dict[str, Any] = {}
        for name, value in record.items():
            row |= {f"{name}_{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat.append({name: _csv_cell(value) for name, value in row.items()})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, flat[0].keys() if flat else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def plain_text(text: str) -> str:
    r"""Return the text in one line, with characters that cannot be printed as escapes, such as those of a terminal.

    Example:
      >>> from rs_consistency.report.formats import plain_text
      >>> print(plain_text("a\n b\x1b[2J"))
      a b\x1b[2J
    """
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in line)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = plain_text(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
