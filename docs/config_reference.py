"""The reference of all configuration keys, written from the comments of configs/default.py."""

import re
from pathlib import Path

_LINE = re.compile(r"    config\.([\w.]+) = (.+?)(?:  # (.*))?")
_INTRODUCTION = """# Every key of a configuration

This page is made from `configs/default.py`. A file in `configs/` starts from these values and changes some of them. A
published cell (`--config=configs/mnist.py:method=macer,sigma=0.5`) changes more, and `--config.KEY=VALUE` any key.
A run keeps its settings in `config.json` of its workdir.

Keys and types are checked against `configs/default.py`, wherever a configuration comes from. No program reads another
key, so another key is refused; only a method that was added to `METHODS` elsewhere brings a block of its own name.
"""


def write_reference(source: Path, target: Path) -> None:
    """Write the page where it is not up to date.

    Raises:
      ValueError: for a key that no comment explains.
    """
    text = reference(source.read_text(encoding="utf-8"))
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def reference(source: str) -> str:
    """Return the page about a source text of the form of configs/default.py: Markdown, with a table for each block."""
    titles, tables, above = {"": "Of the run"}, {"": []}, []
    for line in source.splitlines():
        if comment := re.fullmatch(r"    # (.*)", line):
            above.append(comment[1])
            continue
        if found := _LINE.fullmatch(line):
            key, default, meaning = found[1], found[2], found[3] or " ".join(above)
            if default == "ConfigDict()":
                titles[key], tables[key] = f"`config.{key}`" + (f": {found[3]}" if found[3] else ""), []
            elif not meaning:
                raise ValueError(f"config.{key} has no comment")
            else:
                row = f"| `{key}` | `{default}` | {meaning} |"
                tables[key.rpartition(".")[0]].append(row)
        above = []
    parts = [_INTRODUCTION]
    for block, rows in tables.items():
        parts += [f"## {titles[block]}", "", "| key | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(parts)
