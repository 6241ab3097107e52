"""The configuration file of a command line, and the `configs` package that it imports from."""

import importlib.util
import inspect
import re
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict, FrozenConfigDict

from rs_consistency.common.errors import UserError, first_line
from rs_consistency.common.files import read_bytes

PACKAGE = "configs"
_OWN = Path(__file__).resolve().parents[2] / PACKAGE  # of a clone, and of an installed wheel
_LARGEST = 2**20  # bytes of a configuration file


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


def overridden_key(word: str) -> str | None:
    """Return the key that a word of a command line sets, such as `optimizer.lr`; None for any other word."""
    found = re.match(r"--?(?:no)?config\.([^=]*)", word)
    return found and found[1]


def load(value: str) -> ConfigDict:
    """Return the configuration of a file, for the text FILE or FILE:CELL.

    Raises:
      UserError: where the file cannot be read, raises an error, or has no `get_config` that returns a ConfigDict.
    """
    name, *cell = value.split(":", 1)
    if not name:
        raise UserError("--config cannot be read: Path to config file is an empty string; give configs/mnist.py")
    try:
        source = read_bytes(Path(name), at_most=_LARGEST)
    except UserError as error:
        raise UserError(f"--config cannot be read: {error}") from None
    except OSError as error:
        reason = f"{name}: {error.strerror}; give a file such as configs/mnist.py"
        raise UserError(f"--config cannot be read: {reason}") from None
    module = sys.modules["__config__"] = ModuleType("__config__")
    module.__file__ = name
    try:
        exec(compile(source, name, "exec"), vars(module))
        get_config = getattr(module, "get_config", None)
        config = get_config(*_checked(get_config, name, cell))
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the file raises; not even SystemExit is a success
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        place = f"{name}, line {lines[-1]}" if lines else name
        raise UserError(f"--config: {place}: {type(error).__name__}: {first_line(error)}; mend the file") from error
    if not isinstance(config, ConfigDict):
        returned = f"get_config() of {name} returns {type(config).__name__}"
        raise UserError(f"--config: {returned}; return a ConfigDict, as in configs/mnist.py")
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _checked(get_config: object, name: str, cell: list[str]) -> list[str]:
    """Return the arguments of a `get_config`, no or one cell; raise a `UserError` if it is none, or takes others."""
    if not callable(get_config):
        raise UserError(f"--config: {name} has no function get_config; write one, as in configs/mnist.py")
    try:
        inspect.signature(get_config).bind(*cell)
    except TypeError:
        if cell:
            raise UserError("--config: this file has no published cells; leave out what follows the colon") from None
        raise UserError(f"--config: get_config() of {name} needs a cell; write --config={name}:CELL") from None
    return cell


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
