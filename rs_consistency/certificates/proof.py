"""The proof of a line: its row from its counts, to write it, to audit it, or to conclude at another alpha or bound.

The votes are expensive and stay as they are. The rest of a row follows from them by arithmetic, with the settings of
the record beside the file, `NAME.json`.
"""

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rs_consistency.certificates.columns import CERTIFY, DECIDE, WORDS, Row, Schema, make_rows
from rs_consistency.certificates.read import Certificates, Table, certificate_path, read_rows, to_columns
from rs_consistency.certificates.record import Record, Settings, record_path, unpacked_path
from rs_consistency.common import checks
from rs_consistency.common.errors import UserError
from rs_consistency.statistics import sequential
from rs_consistency.statistics.bounds import ABSTAIN, BOUNDS, certify_votes, p_value_of

_MORE_VOTES = "none before more votes"  # a decision that was not reached when the votes ended
# One unit of the last written digit: another version of SciPy may have computed the quantile a little differently.
_RADIUS_TOLERANCE = Decimal("0.000001")


class Evidence(NamedTuple):
    """The lines of a file and the votes that they rest on.

    Attributes:
      settings: with the alpha and the bound that the certificates were concluded with.
      alpha: the same alpha, exactly; see `decimal_value`.
      rows: N rows, read or recomputed.
      count: `[N]`, votes for the selected class among the n that measured it.
      lower: `[N]` float64, the lower confidence bounds of p_A (`two_class`: at alpha / 2).
    """

    settings: Settings
    alpha: Fraction
    rows: list[Row]
    count: np.ndarray
    lower: np.ndarray


def load(
    path: Path,
    *,
    alpha: float | None = None,
    bound: str | None = None,
    bonferroni: bool = False,
    need_counts: bool = False,
) -> tuple[Certificates, Evidence | None]:
    """Read a certificate file, and recompute it from its counts if asked to.

    Without alpha, bound and bonferroni, the lines are those of the file. If it has counts and its record, a line that
    claims more than its counts prove is an error; a line that claims less stays. With any of the three, predictions and
    radii are recomputed, whatever the file says. With the file's own alpha and bound they are the written ones.

    Guarantee: that of `bounds.certify_votes` at the new alpha, for an alpha and a bound that were not chosen by looking
    at the counts. Whoever takes the best of several errs with a probability of up to the sum of their alphas.

    Args:
      path: a workdir or a certificate file, packed or not.
      alpha: error probability of one certificate; None for the file's.
      bound: one of `bounds.BOUNDS`; None for the file's.
      bonferroni: divide alpha by the number of images N of the file. Then the probability that any of its certificates
        is wrong is at most alpha (the union bound; the images' votes need not be independent).
      need_counts: refuse a file without counts or record even if nothing is recomputed.

    Returns:
      The certificates and their evidence: None for a file without counts or record, or of another mode than certify.

    Raises:
      UserError: for a file that `read_rows` refuses, a damaged record, counts that contradict it, a claim that they do
        not prove, and counts that are needed and missing.
    """
    if alpha is not None:
        alpha = checks.probability("alpha", alpha)
    if bound is not None:
        checks.one_of("bound", bound, BOUNDS)
    recompute = alpha is not None or bound is not None or bonferroni
    file = certificate_path(path)
    schema, by_index = read_rows(file)
    table = to_columns(file, schema, by_index)
    record, missing = _read_record(file, schema)
    if record is None:
        if recompute or need_counts:
            raise UserError(f"{path} {missing}; leave out --alpha, --bound, --bonferroni and --joint, or this file")
        return table, None
    settings, rows = record.settings, list(by_index.values())
    for row in rows:
        if not is_possible(CERTIFY, settings, row):
            raise UserError(f"{path}, image {row['idx']}: {impossible(settings)}")
    each = decimal_value(settings.alpha if alpha is None else alpha) / (len(rows) if bonferroni else 1)
    settings = settings._replace(alpha=checks.probability("alpha", float(each)), bound=bound or settings.bound)
    proven, lower = _certificates(settings, _columns(rows))
    if recompute:
        rows, table = proven, to_columns(file, schema, {row["idx"]: row for row in proven})
    else:
        _check_claims(path, rows, proven)
    return table, Evidence(settings, each, rows, np.array([row["count"] for row in rows]), lower)


def contradictions(table: Table) -> dict[int, str]:
    """Return image number -> how its line differs from the line that its counts give, for each line that does."""
    schema, settings = table.record.schema, table.record.settings
    possible = [row for row in table.rows.values() if is_possible(schema, settings, row)]
    found = dict.fromkeys(table.rows, impossible(settings))
    proven = rows_of_counts(schema, settings, _columns(possible)) if possible else []
    for old, new in zip(possible, proven, strict=True):
        differing = [f"{name} {old[name]}, its counts give {new[name]}" for name in old if old[name] != new[name]]
        found[old["idx"]] = ", ".join(differing)
    return {index: text for index, text in found.items() if text}


def rows_of_counts(schema: Schema, settings: Settings, columns: dict[str, np.ndarray]) -> list[Row]:
    """Return the rows that the program writes for G images with these counts and settings.

    Args:
      schema: the kind of the lines.
      settings: how the votes were cast.
      columns: `[G]` or one value each: idx, label and time, which are kept, and the counts, with `selected` where there
        are n0 votes. Mode predict needs `predict`, the most voted class, which no count names. A `p_value` that differs
        from the computed one by rounding is kept, too.
    """
    if schema is CERTIFY:
        return _certificates(settings, columns)[0]
    return (_decisions if schema is DECIDE else _predictions)(settings, columns)


def decimal_value(number: float) -> Fraction:
    """Return the decimal number that a float is written as: 1/1000 for 0.001, whose float64 is a little more."""
    return Fraction(repr(number))


def uniform_draws(settings: Settings, indices: np.ndarray) -> np.ndarray | None:
    """Return the draws `[G]` of the bound `randomized` for images with these numbers; None for another bound."""
    if settings.bound != "randomized":
        return None
    from rs_consistency.noise import bound_uniform  # imports JAX, slowly, which no other bound needs

    return bound_uniform(settings.seed, indices)


def is_possible(schema: Schema, settings: Settings, row: Row) -> bool:
    """Return whether votes with these settings can give the counts of a row."""
    n, count = settings.n, row["count"]
    if schema is CERTIFY:
        return row["count0"] <= settings.n0 and count + row["count_runner_up"] <= n
    if schema is DECIDE:
        looked = row["votes"] == n or (0 < row["votes"] < n and row["votes"] % settings.look_every == 0)
        return row["count0"] <= settings.n0 and count <= row["votes"] and looked
    return row["count_runner_up"] <= count and 1 <= count + row["count_runner_up"] <= n


def impossible(settings: Settings) -> str:
    """Return the fault of a row that is not possible."""
    return f"its counts cannot be with {f'n0={settings.n0} and ' if settings.n0 else ''}n={settings.n}"


def _certificates(settings: Settings, columns: dict[str, np.ndarray]) -> tuple[list[Row], np.ndarray]:
    """Return the rows, and the lower confidence bounds of p_A."""
    uniform, counts = uniform_draws(settings, columns["idx"]), (columns["count"], columns["count_runner_up"])
    proven = certify_votes(
        *counts, settings.n, alpha=settings.alpha, bound=settings.bound, uniform=uniform, **settings.law._asdict()
    )
    prediction = np.where(proven.certified, columns["selected"], ABSTAIN)
    return make_rows(**columns | {"predict": prediction, "radius": proven.radius}), proven.lower


def _decisions(settings: Settings, columns: dict[str, np.ndarray]) -> list[Row]:
    count, votes, law = columns["count"], columns["votes"], settings.law
    decided = sequential.decide(count, votes, radius=settings.radius, alpha=settings.alpha, **law._asdict())
    early = (decided == sequential.UNDECIDED) & (votes < settings.n)
    words = [_MORE_VOTES if one else WORDS[each] for one, each in zip(early, decided.tolist(), strict=True)]
    certified = decided == sequential.CERTIFIED
    prediction = np.where(certified, columns["selected"], ABSTAIN)
    # As the user wrote it: 0.3, not the float64 beside it, which is a little less.
    radius = np.where(certified, Decimal(repr(settings.radius)), Decimal(0))
    return make_rows(**columns | {"predict": prediction, "radius": radius, "decision": words})


def _predictions(settings: Settings, columns: dict[str, np.ndarray]) -> list[Row]:
    counts = columns["count"], columns["count_runner_up"]
    exact = p_value_of(*counts, n=settings.n, slack=settings.law.slack)
    written = columns.get("p_value", exact)
    p_value = np.where(np.isclose(written, exact, rtol=1e-9, atol=1e-300), written, exact)
    named = np.where(columns["predict"] == ABSTAIN, "a class", columns["predict"].astype(object))
    prediction = np.where(p_value > settings.alpha, ABSTAIN, named)
    return make_rows(**columns | {"predict": prediction, "radius": 0.0, "p_value": p_value})


def _columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _check_claims(path: Path, rows: Sequence[Row], proven: Sequence[Row]) -> None:
    """Raise a `UserError` for the first line that claims more than its counts prove."""
    for row, right in zip(rows, proven, strict=True):
        claimed, predict = row["predict"], right["predict"]
        if claimed not in (ABSTAIN, predict) or row["radius"] > right["radius"] + _RADIUS_TOLERANCE:
            proves = "no certificate" if predict == ABSTAIN else f"class {predict}, radius {right['radius']}"
            raise UserError(
                f"{path}, image {row['idx']}: predict={claimed}, radius={row['radius']} do not follow from the counts,"
                f" which prove {proves}; certify again, or recompute with --alpha"
            )


def _read_record(path: Path, schema: Schema | None) -> tuple[Record | None, str]:
    """Return the record that a file's counts need to prove radii; or None, and what is missing."""
    if schema is not CERTIFY:
        return None, f"has no columns {', '.join(CERTIFY.columns)}, as certify.py writes them"
    file = unpacked_path(path)
    if file.suffix != ".tsv" or not record_path(file).is_file():
        return None, f"has no {file.with_suffix('.json').name} beside it that says how it was made"
    record = Record.read(record_path(file))
    if record.schema is not CERTIFY:
        mode = record.schema.name
        return None, f"was made with mode={mode!r}, and only the counts of mode={CERTIFY.name!r} prove radii"
    return record, ""
