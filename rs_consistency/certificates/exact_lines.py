"""Exact lines: each claim of a certificate file, proven from its counts in whole numbers.

`proof` computes lines in float64, with SciPy. Here `statistics.exact` proves what is written, without either:

| mode | what a line claims | where |
|---|---|---|
| certify | the class `selected`, and the radius as it is printed | predict is not -1 |
| decide | certified for the class `selected`, or not certified, at the radius of the record | it is not undecided |
| predict | the class | predict is not -1 |
| attack | the class at the adversarial image; neither its distance nor the class at the image | adversarial is not -1 |

Other lines claim nothing. All numbers are exact: alpha and the radius of a decision are the decimal numbers that were
given, Bonferroni divides alpha as a fraction, and sigma and the slack of the noise are float64 numbers. The votes
themselves are believed: `audit` draws some again.
"""

import functools
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, PREDICT, WORDS, Row, Schema
from rs_consistency.certificates.proof import Evidence, impossible, is_possible, uniform_draws
from rs_consistency.certificates.read import certificate_path, read_rows
from rs_consistency.certificates.record import Settings
from rs_consistency.common.checks import decimal_value
from rs_consistency.common.errors import UserError
from rs_consistency.common.progress import progress_bar
from rs_consistency.statistics.bounds import ABSTAIN, ATTACK_TESTS
from rs_consistency.statistics.exact import proves_decision, proves_prediction, proves_radius
from rs_consistency.statistics.samplers import GRID
from rs_consistency.statistics.sequential import CERTIFIED, UNDECIDED

_IN_A_PROOF = {  # columns that a claim and its proof consist of
    CERTIFY: ("predict", "radius", "selected", "count", "count_runner_up", "votes"),
    DECIDE: ("predict", "radius", "selected", "count", "votes", "decision"),
    PREDICT: ("predict", "radius", "count", "count_runner_up"),
    ATTACK: ("predict", "radius", "adversarial", "count", "count_runner_up"),
}


class Proven(NamedTuple):
    """The result of a proof.

    Attributes:
      settings: how the votes were cast.
      claims: number of lines that claim something: all of them are proven. `analyze.py --format=json` calls it `exact`.
      lines: number of lines.
    """

    settings: Settings
    claims: int
    lines: int

    def text(self) -> str:
        """Return what is proven, and what is assumed about the noise."""
        noise = "if float32 noise is taken for exact Gaussian noise"
        if self.settings.sampler == GRID:
            noise = f"with the sampler's error of {self.settings.law.slack:.2g} a vote included"
        if self.settings.restarts is not None:
            noise += "; distances, and the classes at the images themselves, are not in the votes of the file"
        return f"all {self.claims} claims in {self.lines} lines are proven in whole numbers, {noise}"


def prove(path: Path, evidence: Evidence | None) -> Proven:
    """Prove every line of a file that `proof.load` read: as it is written, or as it was recomputed there.

    Args:
      path: a workdir, or a certificate file of any mode. The file may be packed.
      evidence: from `proof.load`. For None, the lines are read from the file.

    Raises:
      UserError: for a file without counts or record, a damaged one, or the first line that is not proven.
    """
    if evidence is None:
        schema, settings, rows, alpha = _read(path)
    else:
        schema, settings, rows, alpha = CERTIFY, evidence.settings, evidence.rows, evidence.alpha
    for index, fault in unproven(schema, settings, rows, alpha=alpha).items():
        remedy = "certify again" if evidence is None else "certify again, or recompute with --alpha"
        raise UserError(f"{path}, image {index}: {fault}; {remedy}")
    return Proven(settings, sum(_claim(schema, row) != "" for row in rows), len(rows))


def unproven(schema: Schema, settings: Settings, rows: Collection[Row], *, alpha: Fraction) -> dict[int, str]:
    """Return image number -> the fault of its line, for each line that its counts do not prove.

    Guarantee: for every other line that of the function of `statistics.exact`, if its votes have the law of the
    settings.

    Args:
      schema: the kind of the lines.
      settings: how the votes were cast. Their alpha is not used.
      rows: the lines.
      alpha: error probability of a line, exactly.

    Example:
      >>> from decimal import Decimal
      >>> from fractions import Fraction
      >>> from rs_consistency.certificates.columns import CERTIFY
      >>> from rs_consistency.certificates.exact_lines import unproven
      >>> from rs_consistency.certificates.record import Settings
      >>> settings = Settings(sigma=0.5, n=100_000, alpha=0.001, seed=0, n0=100, bound="clopper_pearson")
      >>> row = {"predict": 3, "selected": 3, "count0": 100, "count": 99_000, "count_runner_up": 800}
      >>> rows = [row | {"idx": 0, "radius": Decimal("1.144999")}, row | {"idx": 1, "radius": Decimal("1.145000")}]
      >>> unproven(CERTIFY, settings, rows, alpha=Fraction(1, 1000))
      {1: 'class 3 with radius 1.145000 is not proven by its counts in whole numbers'}
    """
    draws = uniform_draws(settings, np.array([row["idx"] for row in rows], np.int64))
    names, found = _IN_A_PROOF[schema], dict[int, str]()

    @functools.cache  # many lines are alike, such as all with n votes for their class
    def is_proven(draw: float | None, *values: Any) -> bool:
        return _is_proven(schema, settings, dict(zip(names, values, strict=True)), alpha, draw)

    with progress_bar("proving", len(rows), unit="line", brief=True) as bar:
        for place, row in enumerate(rows):
            claim, draw = _claim(schema, row), None if draws is None else float(draws[place])
            if not is_possible(schema, settings, row):
                found[row["idx"]] = impossible(settings)
            elif claim and not is_proven(draw, *(row.get(name, settings.n) for name in names)):  # older files: n votes
                found[row["idx"]] = f"{claim} is not proven by its counts in whole numbers"
            bar.update()
    return found


def _claim(schema: Schema, row: Row) -> str:
    """Return what a line claims, "" for nothing."""
    if schema is ATTACK:
        return "" if row["adversarial"] == ABSTAIN else f"adversarial class {row['adversarial']}"
    if row["predict"] != ABSTAIN:
        return f"class {row['predict']} with radius {row['radius']}"
    if schema is DECIDE and row["decision"] != WORDS[UNDECIDED]:
        return f"decision {row['decision']}"
    return ""


def _is_proven(schema: Schema, settings: Settings, row: Row, alpha: Fraction, draw: float | None) -> bool:
    """Return whether the counts of a row prove its claim; the draw is for the bound `randomized`."""
    law, count, predict, radius = settings.law, row["count"], row["predict"], row["radius"]
    if schema in (PREDICT, ATTACK):
        counts, level = (settings.n, count, row["count_runner_up"]), alpha / (1 if schema is PREDICT else ATTACK_TESTS)
        other = schema is PREDICT or predict not in (ABSTAIN, row["adversarial"])
        return other and radius == 0 < count and proves_prediction(*counts, alpha=level, eps=law.slack)
    if predict not in (ABSTAIN, row["selected"]):
        return False
    about = {"sigma": law.sigma, "alpha": alpha, "eps": law.slack}
    if schema is CERTIFY:
        about |= {"bound": settings.bound, "runner_up": row["count_runner_up"], "uniform": draw}
        if settings.alpha_share is not None:
            about["alpha_share"] = decimal_value(settings.alpha_share)
        return proves_radius(row["votes"], count, radius, **about)
    certified, asked = row["decision"] == WORDS[CERTIFIED], decimal_value(settings.radius)
    if predict != ABSTAIN and not (certified and radius <= asked):
        return False
    return proves_decision(count, row["votes"], asked, certified=certified, **about)


def _read(path: Path) -> tuple[Schema, Settings, list[Row], Fraction]:
    """Return the lines of a file with a record, their settings and alpha."""
    table = read_rows(certificate_path(path))[2]
    if table is None:
        raise UserError(f"{path} is no file of certify.py with its record beside it; leave out --exact, or this file")
    settings = table.record.settings
    return table.record.schema, settings, list(table.rows.values()), decimal_value(settings.alpha)
