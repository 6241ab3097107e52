"""The configuration file of a command line, and the `configs` package that it imports from."""

import importlib.util
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "configs"
_OWN = Path(__file__).resolve().parents[2] / PACKAGE  # of a clone, and of an installed wheel


def is_config(word: str) -> bool:
    """Return whether a word belongs to the configuration: `--config`, `--config=FILE`, `--config.KEY`."""
    name = word.partition("=")[0]
    return name.startswith("-") and (name.lstrip("-") == "config" or name.lstrip("-").startswith("config."))


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line that name the configuration, and the other words.

    A value may follow its flag after a space, as in train.py. The configuration's words come back with `=`.
    """
    chosen: list[str] = []
    others: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if not is_config(word):
            others.append(word)
            continue
        if "=" not in word and words and not words[0].startswith("--"):
            word = f"{word}={words.popleft()}"
        chosen.append(f"--{word.lstrip('-')}")
    return chosen, others


def resolve(argv: Sequence[str]) -> list[str]:
    """Return a command line whose configuration file can be loaded from any folder.

    Installed commands are started anywhere, without the project's folder among the modules. So `configs/NAME.py` that
    is not in the current folder becomes the project's file. And `from configs import ...` in a configuration file finds
    the files beside it, if their folder is named `configs`, and then the project's.
    """
    chosen, others = split(argv)
    for number, word in enumerate(chosen):
        name, _, value = word.partition("=")
        if name == "--config" and value:
            chosen[number] = f"--config={_resolved(value)}"
    return [*others, *chosen]


def _resolved(value: str) -> str:
    """Return FILE or FILE:CELL with the path of an existing file, whose package is then importable."""
    name, colon, cell = value.partition(":")
    path = Path(name)
    if not path.exists() and not path.is_absolute() and path.parts[:-1] == (PACKAGE,) and (_OWN / path.name).is_file():
        path = _OWN / path.name
    if path.is_file():
        _make_importable(path.resolve().parent)
    return f"{path if name else ''}{colon}{cell}"


def _make_importable(folder: Path) -> None:
    """Let `from configs import ...` find the modules of a folder of that name, and the project's."""
    places = [folder, _OWN] if folder.name == PACKAGE else [_OWN]
    places = [str(place) for place in dict.fromkeys(places) if place.is_dir()]
    package = sys.modules.get(PACKAGE)
    if package is None:
        start = next((Path(place) / "__init__.py" for place in places if (Path(place) / "__init__.py").is_file()), None)
        if start is None:
            return
        spec = importlib.util.spec_from_file_location(PACKAGE, start, submodule_search_locations=places)
        package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    known = list(getattr(package, "__path__", []))
    resolved = {str(Path(place).resolve()) for place in known}
    package.__path__ = [*known, *(place for place in places if place not in resolved)]
