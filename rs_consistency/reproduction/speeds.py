"""The measured speeds of cells on this machine, and the time that is left of a plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError, note
from rs_consistency.common.files import read_json, write_json
from rs_consistency.common.progress import duration
from rs_consistency.reproduction.plan import Cell, attack_steps, votes_of
from rs_consistency.reproduction.state import State

_Known = dict[str, dict[str, float]]
_BOTH = {"epoch_seconds", "votes_per_second"}


def _is_speed(value: Any) -> bool:
    """Return whether a value is a number by which a time can be estimated, and no mark of a damaged file."""
    return type(value) in (int, float) and 1e-12 < value < 1e12


class Estimate(NamedTuple):
    """The time of the cells whose speed is known, and the number of the other cells."""

    seconds: float
    unknown: int = 0

    def text(self) -> str:
        """Return the estimate as text."""
        if not self.unknown:
            return f"about {duration(self.seconds)}"
        cells = f"{self.unknown} cell{'s' if self.unknown > 1 else ''}"
        if not self.seconds:
            return f"time of {cells} not known"
        return f"at least {duration(self.seconds)}, without {cells} whose speed is not known"


class _Facts(NamedTuple):
    """The kind of a cell, and the epochs of its training."""

    kind: str
    epochs: int


class Speeds:
    """The speeds of kinds of cells, measured before the first run, and again by every run.

    A file in the plan's folder keeps them for the next call. Machines that share the folder share the file.
    """

    def __init__(self, path: Path, *, where: str = "") -> None:
        """Read the known speeds; damaged entries are measured again.

        `where` is host and devices. Speeds of other hosts and devices are kept, and not used.
        """
        self._path, self._where = path, where
        self._known = self._read()
        self._learned: set[str] = set()
        self._facts_of: dict[tuple[Any, ...], _Facts] = {}

    def _read(self) -> _Known:
        try:
            found = read_json(self._path) if self._path.exists() else {}
        except UserError as error:
            note(f"{error}; until then, speeds are measured again")
            return {}
        return {
            kind: {name: value for name, value in speeds.items() if _is_speed(value)}
            for kind, speeds in found.items()
            if isinstance(speeds, dict)
        }

    def knows(self, cell: Cell) -> bool:
        """Return whether training and certification of a cell's kind were measured."""
        return self._known.get(self.kind(cell), {}).keys() >= _BOTH

    def learn(self, cell: Cell, *, keep: bool = False, **found: float | None) -> None:
        """Take `epoch_seconds` or `votes_per_second` of a cell's kind; write all learned speeds if `keep`."""
        new, kind = {name: value for name, value in found.items() if _is_speed(value)}, self.kind(cell)
        self._known.setdefault(kind, {}).update(new)
        self._learned.add(kind)
        if keep:  # beside the speeds that others have written meanwhile
            write_json(self._path, {**self._read(), **{kind: self._known[kind] for kind in self._learned}})

    def seconds_left(self, cell: Cell, state: State) -> float | None:
        """Return the seconds left of a cell at the speed of one run, None where it is not known."""
        if state.certified:
            return 0.0
        known = self._known.get(self.kind(cell), {})
        if not known.keys() >= _BOTH:
            return None
        epochs = 0 if state.trained else self._facts(cell).epochs - state.epochs
        votes = (cell.selection.size - state.images) * votes_of(cell)
        return epochs * known["epoch_seconds"] + votes / known["votes_per_second"]

    def estimate(self, cells: Sequence[tuple[Cell, State]], *, jobs: int) -> Estimate:
        """Return the time of all cells together, `jobs` at a time."""
        found = [self.seconds_left(cell, state) for cell, state in cells]
        known = [seconds for seconds in found if seconds is not None]
        return Estimate(max(sum(known) / jobs, max(known, default=0.0)), len(found) - len(known))

    def kind(self, cell: Cell) -> str:
        """Return all that the speed depends on: machine, data, model and method, not sigma, seed and schedule."""
        return self._facts(cell).kind

    def _facts(self, cell: Cell) -> "_Facts":
        """Return the facts of a cell, made once: a plan's progress needs those of all cells twice a second."""
        key = (cell.name, *sorted(cell.overrides.items()))
        if key not in self._facts_of:
            config = cell.config()
            self._facts_of[key] = _Facts(self._kind(config), config.num_epochs)
        return self._facts_of[key]

    def _kind(self, config: ConfigDict) -> str:
        consistency = "+consistency" if config.consistency.lbd > 0 else ""
        method = f"{config.method}{consistency} M{config.num_noise} T{attack_steps(config)}"
        return " ".join(filter(None, [self._where, config.dataset.name, config.model, config.dtype, method]))
