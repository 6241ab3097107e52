"""The configuration file of a command line: found, and with the `configs` package that it imports from."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "configs"
_OWN = Path(__file__).resolve().parents[2] / PACKAGE  # of a clone, and of an installed wheel


def is_config(word: str) -> bool:
    """Whether a word of a command line belongs to the configuration: `--config`, `--config=FILE`, `--config.KEY`."""
    name = word.partition("=")[0]
    return name.startswith("-") and (name.lstrip("-") == "config" or name.lstrip("-").startswith("config."))


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that name the configuration, and the others.

    A value may follow its flag after a space, as in train.py; the configuration's words come back with `=`.
    """
    chosen: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if not is_config(word):
            others.append(word)
            continue
        if "=" not in word:
            value = next(words, None)
            if value is not None and not value.startswith("--"):
                word = f"{word}={value}"
            elif value is not None:
                others.append(value)
        chosen.append(f"--{word.lstrip('-')}")
    return chosen, others


def resolve(argv: Sequence[str]) -> list[str]:
    """A command line whose configuration file can be loaded, wherever the program was started.

    The programs' folder is not searched for modules when they are installed commands, and a file such as
    `configs/mnist.py` is not in the current folder then. So `from configs import ...` in a configuration file finds the
    files beside it, if their folder is named `configs`, and then the project's; and `configs/NAME.py` that is not here
    is the project's.
    """
    found: list[str] = []
    take_next = False
    for word in argv:
        name, _, value = word.partition("=")
        if take_next:
            word = _resolved(word)
        elif is_config(word) and name.lstrip("-") == "config" and value:
            word = f"{name}={_resolved(value)}"
        take_next = is_config(word) and word.lstrip("-") == "config"
        found.append(word)
    return found


def _resolved(value: str) -> str:
    """FILE or FILE:CELL, where FILE is there; with its package made importable."""
    name, colon, cell = value.partition(":")
    path = Path(name)
    if not path.exists() and not path.is_absolute() and path.parts[:-1] == (PACKAGE,) and (_OWN / path.name).is_file():
        path = _OWN / path.name
    if path.is_file():
        _make_importable(path.resolve().parent)
    return f"{path if name else ''}{colon}{cell}"


def _make_importable(folder: Path) -> None:
    """Lets `from configs import ...` find the modules of a folder of that name, and the project's."""
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
