"""The proof of a line: its row from its counts, to write it, to audit it, or to conclude at another alpha or bound.

The votes are expensive and stay as they are. The rest of a row follows from them by arithmetic, with the settings of
the record beside the file, `NAME.json`.
"""

from collections.abc import Collection, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, PREDICT, WORDS, Row, Schema, make_rows
from rs_consistency.certificates.read import Certificates, Table, certificate_path, read_rows, to_columns
from rs_consistency.certificates.record import Settings, unpacked_path
from rs_consistency.common import checks
from rs_consistency.common.checks import decimal_value
from rs_consistency.common.errors import UserError
from rs_consistency.statistics import sequential
from rs_consistency.statistics.allocation import MOST_TOLERATED, votes_for_tolerance
from rs_consistency.statistics.bounds import (
    ABSTAIN,
    ALPHA_SHARE,
    ATTACK_TESTS,
    BOUNDS,
    Certified,
    certify_votes,
    p_value_of,
)

_MORE_VOTES = "none before more votes"  # a decision that was not reached when the votes ended
# One unit of the last written digit: another version of SciPy may have computed the quantile a little differently.
_ROUNDING = Decimal("0.000001")


class Evidence(NamedTuple):
    """The lines of a file and the votes that they rest on.

    Attributes:
      settings: with the alpha and the bound that the certificates were concluded with.
      alpha: the same alpha, exactly; see `checks.decimal_value`.
      rows: N rows, read or recomputed.
      count: `[N]`, votes for the selected class among the votes that measured it.
      votes: `[N]`, these votes.
      lower: `[N]` float64, the lower confidence bounds of p_A (`two_class`: at its share of alpha).
    """

    settings: Settings
    alpha: Fraction
    rows: list[Row]
    count: np.ndarray
    votes: np.ndarray
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

    Without alpha, bound and bonferroni, the lines are those of the file. If it has counts and its record, in whatever
    mode, a line that claims more than its counts prove is an error; a line that claims less stays. With any of the
    three, predictions and radii are recomputed, whatever the file says. With the file's own alpha and bound they are
    the written ones. A file that was changed after it was finished is an error in either case.

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
        not prove, a change since the file was finished, and counts that are needed and missing.
    """
    if alpha is not None:
        alpha = checks.probability("alpha", alpha)
    if bound is not None:
        checks.one_of("bound", bound, BOUNDS)
    recompute = alpha is not None or bound is not None or bonferroni
    file = certificate_path(path)
    schema, by_index, own = read_rows(file)
    table = to_columns(file, schema, by_index)
    proven = None if own is None else check_table(own, path, claims=not recompute)
    if own is None or schema is not CERTIFY:
        if recompute or need_counts:
            missing = _missing_proof(file, schema)
            raise UserError(f"{path} {missing}; leave out --alpha, --bound, --bonferroni and --joint, or this file")
        return table, None
    settings, rows = own.record.settings, list(by_index.values())
    each = decimal_value(settings.alpha if alpha is None else alpha) / (len(rows) if bonferroni else 1)
    if bound not in (None, settings.bound):
        settings = settings._replace(bound=bound, alpha_share=ALPHA_SHARE if bound == "two_class" else None)
    settings = settings._replace(alpha=checks.probability("alpha", float(each)))
    columns = _columns(rows)
    if recompute:
        proven = _proven(settings, columns)
        rows = _certificates(columns, proven)
        table = to_columns(file, schema, {row["idx"]: row for row in rows})
    votes = np.broadcast_to(columns.get("votes", settings.n), len(rows))
    return table, Evidence(settings, each, rows, columns["count"], votes, proven.lower)


def check_table(table: Table, path: Path, *, claims: bool = True) -> Certified | None:
    """Return the certificates of a file's counts; None for another mode, without lines, or if claims are not checked.

    A file of this program, of any mode, is checked as far as it can be without its network and images.

    Args:
      table: the file.
      path: for messages.
      claims: whether the lines must follow from their counts; the counts must be possible in any case.

    Raises:
      UserError: for the first line whose counts are impossible with the settings of the record, or that claims more
        than they prove; or for a file that was changed after it was finished.
    """
    schema, settings, rows = table.record.schema, table.record.settings, list(table.rows.values())
    _check_tolerated(table)
    for index, fault in faults_of_counts(schema, settings, rows).items():
        raise UserError(f"{path}, image {index}: {fault}; certify again")
    proven = None
    if claims and rows:
        columns = _columns(rows)
        proven = _proven(settings, columns) if schema is CERTIFY else None
        rights = _certificates(columns, proven) if proven else rows_of_counts(schema, settings, columns)
        for row, right in zip(rows, rights, strict=True):
            fault = _excess(schema, row, right)
            if fault:
                remedy = ", or recompute with --alpha" if schema is CERTIFY and not table.changed else ""
                raise UserError(f"{path}, image {row['idx']}: {fault}; certify again{remedy}")
    if table.changed:
        raise UserError(
            f"{path} was changed after it was finished: {table.changed}; restore it from a copy, or certify again"
        )
    return proven


def _check_tolerated(table: Table) -> None:
    settings = table.record.settings
    if settings.tolerance is not None and settings.n > MOST_TOLERATED:
        raise UserError(
            f"{table.path} has a tolerance and n={settings.n}: this version checks a tolerance up to"
            f" {MOST_TOLERATED:,} votes only; check the file with the version that made it"
        )


def contradictions(table: Table) -> dict[int, str]:
    """Return image number -> how its line differs from the line that its counts give, for each line that does."""
    _check_tolerated(table)
    schema, settings = table.record.schema, table.record.settings
    found = faults_of_counts(schema, settings, table.rows.values())
    possible = [row for row in table.rows.values() if is_possible(schema, settings, row)]
    proven = rows_of_counts(schema, settings, _columns(possible)) if possible else []
    for old, new in zip(possible, proven, strict=True):
        differing = [f"{name} {old[name]}, its counts give {new[name]}" for name in old if old[name] != new[name]]
        found[old["idx"]] = ", ".join([*differing, *filter(None, [found.get(old["idx"])])])
    return {index: text for index, text in found.items() if text}


def rows_of_counts(schema: Schema, settings: Settings, columns: dict[str, np.ndarray]) -> list[Row]:
    """Return the rows that the program writes for G images with these counts and settings.

    Args:
      schema: the kind of the lines.
      settings: how the votes were cast.
      columns: `[G]` or one value each: idx, label and time, which are kept, and the counts, with `selected` where there
        are n0 votes. Mode predict needs `predict`, the most voted class, which no count names. Mode attack needs
        `predict`, `adversarial` and `distance`. A `p_value` that differs from the computed one by rounding is kept.
    """
    if schema is CERTIFY:
        return _certificates(columns, _proven(settings, columns))
    return {DECIDE: _decisions, PREDICT: _predictions, ATTACK: _attacks}[schema](settings, columns)


def uniform_draws(settings: Settings, indices: np.ndarray) -> np.ndarray | None:
    """Return the draws `[G]` of the bound `randomized` for images with these numbers; None for another bound."""
    if settings.bound != "randomized":
        return None
    from rs_consistency.noise import bound_uniform  # imports JAX, slowly, which no other bound needs

    return bound_uniform(settings.seed, indices)


def faults_of_counts(schema: Schema, settings: Settings, rows: Collection[Row]) -> dict[int, str]:
    """Return image number -> the fault of its counts, for each row that this program does not write with the settings.

    Beside counts that are not possible, it is a number of votes that the selection did not ask for, or votes for the
    label that contradict the other counts.
    """
    found, planned = {}, [settings.n] * len(rows)
    if settings.tolerance is not None:
        planned = planned_votes(settings, np.array([min(row["count0"], settings.n0) for row in rows])).tolist()
    for row, votes in zip(rows, planned, strict=True):
        if not is_possible(schema, settings, row):
            found[row["idx"]] = impossible(settings)
        elif schema is CERTIFY and row.get("votes", settings.n) != votes:
            found[row["idx"]] = f"votes {row.get('votes', settings.n)}, its selection asks for {votes}"
        elif schema is ATTACK and row["adversarial"] != ABSTAIN and row["predict"] in (ABSTAIN, row["adversarial"]):
            found[row["idx"]] = f"adversarial {row['adversarial']} is no other class than predict {row['predict']}"
        elif not _is_of_label(row, votes):
            found[row["idx"]] = f"count_label {row['count_label']} contradicts its other counts"
    return found


def _is_of_label(row: Row, votes: int) -> bool:
    """Return whether the votes for the label, where they are known, agree with the other counts, of so many votes."""
    if "count_label" not in row:
        return True
    chosen, count, runner_up, own = (
        row.get("selected", row["predict"]),
        row["count"],
        row["count_runner_up"],
        row["count_label"],
    )
    if row["label"] == chosen or (chosen == ABSTAIN and own == count):
        return own == count
    return own == runner_up or (own < runner_up and count + runner_up + own <= votes)


def planned_votes(settings: Settings, count0: np.ndarray) -> np.ndarray:
    """Return the measuring votes `[G]` of images with these votes `[G]` for the selected class in the selection."""
    names = ("n0", "n", "tolerance", "alpha")
    return votes_for_tolerance(count0, **{name: getattr(settings, name) for name in names}, **settings.law._asdict())


def is_possible(schema: Schema, settings: Settings, row: Row) -> bool:
    """Return whether votes with these settings can give the counts of a row."""
    n, count = settings.n, row["count"]
    if schema is DECIDE:
        looked = row["votes"] == n or (0 < row["votes"] < n and row["votes"] % settings.look_every == 0)
        return 1 <= row["count0"] <= settings.n0 and count <= row["votes"] and looked
    runner_up, votes = row["count_runner_up"], row.get("votes", n)
    if schema is CERTIFY:
        good = 1 <= row["count0"] <= settings.n0 and (votes == n if settings.tolerance is None else 1 <= votes <= n)
    else:
        good = runner_up <= count
    least = 0 if schema is ATTACK else 1  # without an adversarial image there are no votes
    return good and least <= count + runner_up <= votes


def impossible(settings: Settings) -> str:
    """Return the fault of a row that is not possible."""
    return f"its counts cannot be with {f'n0={settings.n0} and ' if settings.n0 else ''}n={settings.n}"


def _proven(settings: Settings, columns: dict[str, np.ndarray]) -> Certified:
    counts = columns["count"], columns["count_runner_up"], columns.get("votes", settings.n)
    return certify_votes(
        *counts,
        alpha=settings.alpha,
        bound=settings.bound,
        alpha_share=settings.alpha_share,
        uniform=uniform_draws(settings, columns["idx"]),
        **settings.law._asdict(),
    )


def _certificates(columns: dict[str, np.ndarray], proven: Certified) -> list[Row]:
    prediction = np.where(proven.certified, columns["selected"], ABSTAIN)
    return make_rows(**columns | {"predict": prediction, "radius": proven.radius})


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
    p_value = _p_values(settings, columns)
    named = np.where(columns["predict"] == ABSTAIN, "a class", columns["predict"].astype(object))
    prediction = np.where(p_value > settings.alpha, ABSTAIN, named)
    return make_rows(**columns | {"predict": prediction, "radius": 0.0, "p_value": p_value})


def _attacks(settings: Settings, columns: dict[str, np.ndarray]) -> list[Row]:
    p_value, found = _p_values(settings, columns), columns["adversarial"] != ABSTAIN
    proven = found & (p_value <= settings.alpha / ATTACK_TESTS)
    results = {
        "adversarial": np.where(proven, columns["adversarial"], ABSTAIN),
        "distance": np.where(proven, columns["distance"], Decimal("inf")),
    }
    return make_rows(**columns | {"radius": 0.0, "p_value": p_value, **results})


def _p_values(settings: Settings, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Return the p-values of the counts; the written ones where they differ by rounding."""
    counts = np.maximum(columns["count"], 1), np.where(columns["count"] > 0, columns["count_runner_up"], 1)
    exact = p_value_of(*counts, n=settings.n, slack=settings.law.slack)  # 1 without votes
    written = columns.get("p_value", exact)
    return np.where(np.isclose(written, exact, rtol=1e-9, atol=1e-300), written, exact)


def _columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _excess(schema: Schema, row: Row, right: Row) -> str:
    """Return the fault of a row that claims more than the row from its counts, "" for none. It may claim less."""
    claims, undecided = row["predict"] != ABSTAIN, WORDS[sequential.UNDECIDED]
    if schema is DECIDE:
        claims = claims and row["decision"] == WORDS[sequential.CERTIFIED]
    # A claim is of a class and a radius: a row without it has neither.
    predict, radius = (right["predict"], right["radius"]) if claims else (ABSTAIN, Decimal(0))
    if row["predict"] not in (ABSTAIN, predict) or row["radius"] > radius + (_ROUNDING if schema is CERTIFY else 0):
        found = _named(row, "predict", "radius", *(["decision"] if schema is DECIDE else []))
        proves = "no certificate" if schema is CERTIFY else "no class"
        if right["predict"] != ABSTAIN:
            proves = f"class {right['predict']}, radius {right['radius']}"
        return f"{found} do not follow from the counts, which prove {proves}"
    excess = {
        "decision": lambda: row["decision"] not in (undecided, right["decision"]),
        "p_value": lambda: row["p_value"] < right["p_value"],
        "adversarial": lambda: row["adversarial"] not in (ABSTAIN, right["adversarial"]),
        "distance": lambda: row["distance"] < (right["distance"] if row["adversarial"] != ABSTAIN else Decimal("inf")),
    }
    names = [name for name, exceeds in excess.items() if name in row and exceeds()]
    if not names:
        return ""
    return f"{_named(row, *names)} does not follow from the counts, which give {_named(right, *names)}"


def _named(row: Row, *names: str) -> str:
    return ", ".join(f"{name}={row[name]}" for name in names)


def _missing_proof(path: Path, schema: Schema | None) -> str:
    """Return which of the things a file lacks that prove radii."""
    if schema is None:
        return f"has no columns {', '.join(CERTIFY.columns)}, as certify.py writes them"
    if schema is not CERTIFY:
        return f"is of mode={schema.name!r}, and only the counts of mode={CERTIFY.name!r} prove radii"
    return f"has no {unpacked_path(path).with_suffix('.json').name} beside it that says how it was made"
