"""The record of a certificate file: how its lines were made.

`NAME.tsv` holds a line for each image (see `certificates.columns`). `NAME.json`, the record, holds

| key | meaning |
|---|---|
| mode | certify, decide, predict or attack: the kind of the file |
| the settings, data_digest, parameter_digest, ... | whatever the lines depend on: the identity |
| skip, split_size, shard | the images: every skip-th of the split, of these the share of shard "2/5"; null: all |
| identity | the names of the keys above |
| max | number of images that the file is to hold; of all shards together |
| device, versions, code_version, code_digest, git_commit, ... | recorded with the first line |
| program | recorded with it: the compiled network, see `smoothing.one_function.program_of` |
| sampler_error | for readers: the bound of the sampler's error, which every program computes for itself |
| seed_source | whether the seed was given, or drawn by the operating system |
| continued_with | the same, of later calls with another device, other versions or other code |
| finished | once every image is there: when, how many, and the SHA-256 of the `.tsv` |
| shards | in a merged file: for each shard the keys of its record that the merged record lacks |
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, PREDICT, SCHEMAS, Schema
from rs_consistency.certificates.selection import Selection, parse_shard
from rs_consistency.common import checks
from rs_consistency.common.checks import MAX_INDEX, PRECISIONS
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json
from rs_consistency.statistics.allocation import RULE
from rs_consistency.statistics.bounds import BOUNDS
from rs_consistency.statistics.rounded_gaussian import STEPS
from rs_consistency.statistics.samplers import FLOAT, GRID, SAMPLERS, NoiseLaw, noise_law

# Keys that may differ between the calls that write one file; the others' values go to `continued_with`.
PROVENANCE = ("device", "versions", "code_version", "code_digest", "git_commit", "program")
OF_NOISE = ("sampler", "precision", "grid_steps", "image_shape")  # keys by which an older file differs from a new one
_CHANGES_VOTES = ("device", "code_digest", "program")  # beside the versions
# Keys of the network and the images: where a record has them, its identity names them, or files would not be compared.
_BINDING = ("dataset", "split", "data_digest", "model", "dtype", "checkpoint_step", "parameter_digest")
_BINDING_OF_TORCH = ("torch_checkpoint_sha256", "torch_input")
_TEXTS = ("dataset", "split", "data_digest", "model", "dtype", "parameter_digest", *_BINDING_OF_TORCH)
_TEXTS += ("device", "code_version", "code_digest", "git_commit", "command")


class Settings(NamedTuple):
    """How votes were cast, and how rows follow from them. None where the mode has no such setting.

    `sigma` is the standard deviation of the noise and `alpha` the error probability of a line. `n0` votes select the
    class and `n` measure, in mode decide at most so many. With a `tolerance` of the radius, they are at most n, by the
    `tolerance_rule` of `statistics.allocation`. The `seed` is that of the noise, and of the draws of the randomized
    `bound`; the bound two_class has an `alpha_share`. A decision at the l2 `radius` looks at the votes after every
    `look_every`. An attack takes `steps` from `restarts` points, with gradients of `copies` noisy copies. The `sampler`
    is that of the noise, and `precision` that of the network's products in float32. `grid` noise has steps of 1 /
    `grid_steps`, and its error depends on `image_shape`, (H, W, C).
    """

    sigma: float
    n: int
    alpha: float
    seed: int
    n0: int | None = None
    bound: str | None = None
    alpha_share: float | None = None
    tolerance: float | None = None
    tolerance_rule: int | None = None
    radius: float | None = None
    look_every: int | None = None
    copies: int | None = None
    steps: int | None = None
    restarts: int | None = None
    sampler: str = FLOAT
    precision: str = "default"
    grid_steps: int | None = None
    image_shape: Sequence[int] = ()

    @property
    def law(self) -> NoiseLaw:
        """The law of the noise. Its slack is computed here: a record's own number is not believed."""
        about = {"dimension": math.prod(self.image_shape), "steps": self.grid_steps or STEPS}
        return noise_law(self.sampler, sigma=self.sigma, **about)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "sigma": partial(checks.number_above, limit=0.0),
    "n": checks.count,
    "alpha": checks.probability,
    "seed": partial(checks.whole_number, at_least=0, at_most=checks.MAX_SEED),
    "n0": checks.count,
    "bound": lambda name, value: checks.one_of(name, value, BOUNDS) or value,
    "alpha_share": checks.probability,
    "tolerance": partial(checks.number_above, limit=0.0),
    "tolerance_rule": partial(checks.whole_number, at_least=RULE, at_most=RULE),
    "radius": partial(checks.number_from, at_least=0),
    "look_every": checks.count,
    "copies": checks.count,
    "steps": checks.count,
    "restarts": checks.count,
    "sampler": lambda name, value: checks.one_of(name, value, SAMPLERS) or value,
    "precision": lambda name, value: checks.one_of(name, value, PRECISIONS) or value,
    "grid_steps": partial(checks.whole_number, at_least=STEPS, at_most=STEPS),
    "image_shape": lambda name, value: _shape(name, value),
}
_OF_MODE = {
    CERTIFY.name: ("n0", "bound"),
    DECIDE.name: ("n0", "radius", "look_every"),
    PREDICT.name: (),
    ATTACK.name: ("copies", "steps", "restarts"),
}
_OF_SAMPLER = {FLOAT: (), GRID: ("grid_steps", "image_shape")}
# Of a record that lacks these keys: there was no choice when it was made.
_UNNAMED = {"sampler": FLOAT, "precision": "default"}
_OF_BOUND = {"two_class": {"alpha_share": 0.5}}


@dataclass(frozen=True)
class Record:
    """A record whose types and ranges were checked; from `read` or `from_json`.

    Attributes:
      path: of the `.json`.
      schema: the kind of the lines; its name is the mode.
      settings: typed and checked.
      selection: the images that the file is to hold.
      identity: the keys that the lines depend on, with their values.
      finished: SHA-256 of the `.tsv`, in hexadecimal, once every image is there.
      content: every key as it was read, in its order; behind them those that older records lack.
    """

    path: Path
    schema: Schema
    settings: Settings
    selection: Selection
    identity: Mapping[str, Any]
    finished: str | None
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a `.json` file; errors as for `from_json`."""
        return cls.from_json(path, read_json(path))

    @classmethod
    def from_json(cls, path: Path, content: Mapping[str, Any]) -> Self:
        """Return the record with the content of a `.json` file.

        Raises:
          UserError: when it is no record of a mode that this version knows, lacks a key, or holds an impossible value.
        """
        mode = content.get("mode")
        if not isinstance(mode, str) or mode not in SCHEMAS:
            raise UserError(f"{path} is no record of a certification that this version knows; give another file")
        try:
            _check_provenance(content)
            names = _list(content, "identity", str)
            of_bound = _OF_BOUND.get(str(content.get("bound")), {})
            unnamed = _UNNAMED | of_bound | ({"tolerance": None} if mode == CERTIFY.name else {})
            unnamed = {key: value for key, value in unnamed.items() if key not in content}
            names, content = [*names, *unnamed], {**content, **unnamed}
            content["identity"] = names
            needed = ["sigma", "n", "alpha", "seed", *_OF_MODE[mode], *_UNNAMED]
            checks.one_of("sampler", content["sampler"], SAMPLERS)
            needed += [*_OF_SAMPLER[content["sampler"]], *of_bound]
            needed += [] if content.get("tolerance") is None else ["tolerance", "tolerance_rule"]
            missing = [] if "max" in content else ["max"]
            known = [name for name in (*Settings._fields, *_BINDING, *_BINDING_OF_TORCH) if name in content]
            needed_names = ("mode", *needed, "skip", "split_size", "shard", "parameter_digest", *known, *names)
            for name in dict.fromkeys(needed_names):
                missing += [] if name in content and name in names else [name]
            if missing:
                raise UserError(f"it lacks {', '.join(missing)}")
            split_size = checks.whole_number("split_size", content["split_size"], at_least=1, at_most=MAX_INDEX + 1)
            skip, most = (checks.whole_number(name, content[name], at_least=1) for name in ("skip", "max"))
            shard = None if content["shard"] is None else parse_shard(content["shard"])
            settings = Settings(**{name: _CHECKS[name](name, content[name]) for name in needed})
            _ = settings.law  # a sigma that the sampler cannot have
            selection = Selection(split_size, skip, most, shard)
            finished, asked = _finished(content), len(selection.images)
            if finished and finished["images"] != asked:
                raise UserError(
                    f"finished names {finished['images']} images, and skip, split_size, shard and max {asked}"
                )
            _check_shards(content, names)
            digest = finished and finished["sha256"]
            identity = {name: content[name] for name in names}
            return cls(path, SCHEMAS[mode], settings, selection, identity, digest, dict(content))
        except UserError as error:
            raise UserError(f"{path} is damaged: {error}; restore it from a copy") from None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object; see `content`."""
        return dict(self.content)

    def finish(self, table: bytes) -> Self:
        """Return the record of the finished table, with the time of now."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"at": at, "images": table.count(b"\n") - 1, "sha256": _sha256(table)}
        return self.from_json(self.path, {**self.content, "finished": entry})

    def change(self, table: bytes) -> str:
        """Return how the content of a finished table contradicts its record, "" if it does not.

        A merged table is compared with the digests of the shards' tables, too, unless it lacks columns that they had.
        """
        if self.finished is None:
            return ""
        if self.finished != _sha256(table):
            return f"its SHA-256 is not the one in {self.path.name}"
        header, *lines = table.splitlines(keepends=True)
        wanted = self.content["finished"]["images"]
        if len(lines) != wanted:
            return f"it holds {len(lines)} images, and {self.path.name} says {wanted}"
        shards = self.content.get("shards", []) if header == self.schema.header.encode() else []
        for place, part in enumerate(shards):
            finished, own = _finished(part), lines[place :: len(shards)]  # behind those of the shard, later ones may be
            images = finished["images"] if finished else len(own) + 1
            if images <= len(own) and finished["sha256"] != _sha256(header + b"".join(own[:images])):
                return f"its lines of shard {part['shard']} do not have the SHA-256 in {self.path.name}"
        return ""

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """Return "key: recorded -> wanted" for each wanted key with another value in the record, or none."""
        recorded = {key: self.content.get(key) for key in wanted}
        return [f"{key}: {recorded[key]!r} -> {wanted[key]!r}" for key in wanted if recorded[key] != wanted[key]]

    def rows_per_device(self, platform: str) -> int | None:
        """Return the noisy images in a batch on a device of a platform when lines were made there; None if unknown."""
        programs = [entry["program"] for entry in self.provenances() if entry["program"]]
        return next((one["rows_per_device"] for one in programs if one.get("platform") == platform), None)

    def provenances(self) -> list[dict[str, Any]]:
        """Return the `PROVENANCE` of every call that made lines; of a merged file, those of all shards first."""
        parts = [*self.content.get("shards", []), self.content]
        entries = []
        for part in parts:
            entries += [*([part] if "device" in part else []), *part.get("continued_with", [])]
        return [{key: entry.get(key) for key in PROVENANCE} for entry in entries]


def record_path(path: Path) -> Path:
    """Return the path of the `.json` beside a `.tsv`; a `UserError` for another suffix, whose record may be shared."""
    if path.suffix != ".tsv":
        raise UserError(f"output={path}: the name must end in .tsv; the record beside it ends in .json")
    return path.with_suffix(".json")


def unpacked_path(path: Path) -> Path:
    """Return the path that a file packed by gzip (`.gz`) had before; of another file its own."""
    return path.with_name(path.name.removesuffix(".gz")) if path.suffix == ".gz" else path


def content_beside(path: Path) -> dict[str, Any]:
    """Return the content of the record beside a certificate file, packed or not; {} where certify.py wrote none.

    Any other program's file may have a `.json` beside it. A record that is damaged is a `UserError`.
    """
    content = json_beside(path)
    return Record.from_json(unpacked_path(path).with_suffix(".json"), content).to_json() if content else {}


def json_beside(path: Path) -> dict[str, Any]:
    """Return what `content_beside` checks; {} for a JSON object that is no record, with no key that shows one."""
    beside = unpacked_path(path).with_suffix(".json")
    content = read_json(beside) if beside.is_file() else {}
    is_record = {"identity", "parameter_digest"} & content.keys() or content.get("mode") in list(SCHEMAS)
    return content if is_record else {}


def differing_provenance(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return the names that differ between two provenances and can change a vote, such as "device" or "jax"."""
    names = [key for key in _CHANGES_VOTES if here.get(key) != there.get(key)]
    mine, theirs = (entry.get("versions") or {} for entry in (here, there))
    return names + [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


def _check_provenance(content: Mapping[str, Any]) -> None:
    for part in (content, *_list(content, "shards", dict)):
        for entry in (part, *_list(part, "continued_with", dict)):
            for name in _TEXTS:
                if not isinstance(entry.get(name), str | None):
                    raise UserError(f"{name}={entry[name]!r} is no text")
            if not isinstance(entry.get("versions", {}), dict):
                raise UserError(f"versions={entry['versions']!r} is no JSON object")
            if not isinstance(entry.get("config"), dict | None):
                raise UserError(f"config={entry['config']!r} is no JSON object")
            if "program" in entry:
                program = entry["program"]
                if not isinstance(program, dict):
                    raise UserError(f"program={program!r} is no JSON object")
                checks.count("rows_per_device", program.get("rows_per_device"), at_most=2**20)


def _list(content: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = content.get(key, [])
    good = isinstance(values, list) and all(isinstance(value, kind) for value in values)
    if not good or (kind is str and not all(map(str.isprintable, values))):
        raise UserError(f"{key}={values!r} is no list of {'texts' if kind is str else 'JSON objects'}")
    return values


def _shape(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{name}={value!r}: use [H, W, C]")
    return [checks.count(name, size, at_most=2**15) for size in value]


def _finished(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the checked entry of a table that was finished, with `images` and `sha256`; None for another table."""
    if "finished" not in content:
        return None
    entry = content["finished"]
    if isinstance(entry, dict) and isinstance(entry.get("images"), int) and isinstance(entry.get("sha256"), str):
        return entry
    raise UserError(f"finished={entry!r} lacks images and sha256")


def _check_shards(content: Mapping[str, Any], identity: Sequence[str]) -> None:
    """Raise a `UserError` where the shards of a merged file are not each shard once, or contradict the identity."""
    shards = content.get("shards", [])
    for number, part in enumerate(shards, 1):
        own = [name for name in identity if name in part and name != "shard"]
        if part.get("shard") != f"{number}/{len(shards)}" or content["shard"] is not None or own:
            about = f"with {own[0]}={part[own[0]]!r}" if own else f"as part of shard {content['shard']!r}"
            raise UserError(f"shards: number {number} of {len(shards)} is shard {part.get('shard')!r} {about}")
        _finished(part)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
