"""Certificates from the counts in their file: audited, or recomputed at another alpha or with another bound.

The votes are the expensive part and stay as they are; what they prove is arithmetic. n, n0, sigma, alpha, seed and
bound come from the record beside the file, `NAME.json`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.certificates.columns import CERTIFY, format_radius
from rs_consistency.certificates.read import Certificates, Counts, certificate_path, read_certificates
from rs_consistency.common import checks
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json
from rs_consistency.statistics.bounds import ABSTAIN, BOUNDS, Certified, certify_votes

_MODE = CERTIFY.name  # of the records that can be analysed here; those without a mode are older, and of this one


class Settings(NamedTuple):
    """How the votes of a file were cast, and what is concluded from them.

    Attributes:
      n0: votes that selected the class.
      n: votes that measured it.
      sigma: standard deviation of the noise.
      alpha: error probability of one certificate.
      seed: of the noise, and of the randomized bound's draws.
      bound: one of `bounds.BOUNDS`.
    """

    n0: int
    n: int
    sigma: float
    alpha: float
    seed: int
    bound: str


class Evidence(NamedTuple):
    """What certificates rest on.

    Attributes:
      settings: with the alpha and the bound that the certificates were concluded with.
      counts: the votes, `[N]` each.
      lower: `[N]` float64, the lower confidence bounds of p_A (`two_class`: at alpha / 2).
    """

    settings: Settings
    counts: Counts
    lower: np.ndarray


def load(
    path: Path,
    *,
    alpha: float | None = None,
    bound: str | None = None,
    bonferroni: bool = False,
    need_counts: bool = False,
) -> tuple[Certificates, Evidence | None]:
    """Reads a certificate file, and recomputes it from its counts if asked to.

    Without alpha, bound and bonferroni, the lines are those of the file. If it holds counts and has its record, they
    are audited: a line that claims more than its counts prove is an error; one that claims less stays. With any of the
    three, predictions and radii are recomputed, and whatever the file says about them does not matter. With the file's
    own alpha and bound the recomputed lines are the written ones.

    Guarantee: that of `bounds.certify_votes` at the new alpha, for an alpha and a bound that were not chosen by looking
    at the counts. Whoever takes the best of several errs with a probability of up to the sum of their alphas.

    Args:
      path: a workdir or a certificate file.
      alpha: error probability of one certificate; None for the file's.
      bound: one of `bounds.BOUNDS`; None for the file's.
      bonferroni: divide alpha by the number of images N of the file. Then the probability that any of its certificates
        is wrong is at most alpha (the union bound; the images' votes need not be independent).
      need_counts: refuse a file without counts or record even if nothing is recomputed.

    Returns:
      The certificates, and what they rest on: None for a file without counts or record, or of another mode than
      certify, if nothing needs them.

    Raises:
      UserError: for a file that `read_certificates` refuses, a damaged record, counts that contradict it, a claim that
        they do not prove; for counts that are needed and missing.
    """
    if alpha is not None:
        checks.probability("alpha", alpha)
    if bound is not None:
        checks.one_of("bound", bound, BOUNDS)
    recompute = alpha is not None or bound is not None or bonferroni
    table = read_certificates(path)
    settings, missing = _read_settings(certificate_path(path), table)
    if settings is None:
        if recompute or need_counts:
            raise UserError(f"{path} {missing}; leave out --alpha, --bound, --bonferroni and --joint, or this file")
        return table, None
    _check_counts(path, table, settings)
    if not recompute:
        proven = _prove(table, settings)
        _audit(path, table, proven)
        return table, Evidence(settings, table.counts, proven.lower)
    each = (settings.alpha if alpha is None else alpha) / (len(table.idx) if bonferroni else 1)
    settings = settings._replace(alpha=checks.probability("alpha", each), bound=bound or settings.bound)
    proven = _prove(table, settings)
    predict = np.where(proven.certified, table.counts.selected, ABSTAIN)
    radius = np.array([float(format_radius(radius)) for radius in proven.radius])
    table = table._replace(predict=predict, radius=radius, correct=(predict == table.label).astype(int))
    return table, Evidence(settings, table.counts, proven.lower)


def _read_settings(path: Path, table: Certificates) -> tuple[Settings | None, str]:
    """What the record says; or None, and what is missing."""
    if table.counts is None:
        return None, f"has no columns {', '.join(CERTIFY.columns)}, as certify.py writes them"
    record_path = path.with_suffix(".json")
    if path.suffix != ".tsv" or not record_path.is_file():
        return None, f"has no {record_path.name} beside it that says how it was made"
    record = read_json(record_path)
    mode = record.get("mode", _MODE)
    if mode != _MODE:
        return None, f"was made with mode={mode!r}, and only the counts of mode={_MODE!r} prove radii"
    absent = [key for key in Settings._fields if key not in record and key != "bound"]
    if absent:
        raise UserError(f"{record_path} does not say {', '.join(absent)}; restore it from a copy, or move it away")
    try:
        bound = record.get("bound", BOUNDS[0])
        checks.one_of("bound", bound, BOUNDS)
        settings = Settings(
            n0=checks.count("n0", record["n0"]),
            n=checks.count("n", record["n"]),
            sigma=checks.number_above("sigma", record["sigma"], 0.0),
            alpha=checks.probability("alpha", record["alpha"]),
            seed=checks.whole_number("seed", record["seed"], at_least=0, at_most=checks.MAX_SEED),
            bound=bound,
        )
    except UserError as error:
        raise UserError(f"{record_path} is damaged: {error}") from None
    return settings, ""


def _check_counts(path: Path, table: Certificates, settings: Settings) -> None:
    counts = table.counts
    for name, values, good, expected in (
        ("idx", table.idx, (table.idx >= 0) & (table.idx <= checks.MAX_INDEX), f"0 to {checks.MAX_INDEX}"),
        ("count0", counts.count0, (counts.count0 >= 0) & (counts.count0 <= settings.n0), f"0 to n0={settings.n0}"),
        ("count", counts.count, (counts.count >= 0) & (counts.count <= settings.n), f"0 to n={settings.n}"),
        (
            "count_runner_up",
            counts.count_runner_up,
            (counts.count_runner_up >= 0) & (counts.count_runner_up <= settings.n - counts.count),
            "0 to n - count",
        ),
        ("selected", counts.selected, counts.selected >= 0, "a class"),
    ):
        if not good.all():
            first = int(np.flatnonzero(~good)[0])
            raise UserError(f"{path}, image {table.idx[first]}: {name}={values[first]}; expected {expected}")


def _prove(table: Certificates, settings: Settings) -> Certified:
    uniform = None
    if settings.bound == "randomized":
        from rs_consistency.noise import bound_uniform  # JAX, slow to import, which no other bound needs

        uniform = bound_uniform(settings.seed, table.idx)
    return certify_votes(
        table.counts.count,
        table.counts.count_runner_up,
        settings.n,
        alpha=settings.alpha,
        sigma=settings.sigma,
        bound=settings.bound,
        uniform=uniform,
    )


def _audit(path: Path, table: Certificates, proven: Certified) -> None:
    """Refuses a file that claims more than its counts prove."""
    selected = table.counts.selected
    # One unit of the last written digit: another version of SciPy may have computed the quantile a little differently.
    too_large = _units(table.radius) > _units([float(format_radius(radius)) for radius in proven.radius]) + 1
    claims = table.predict != ABSTAIN
    wrong = too_large | (claims & ((table.predict != selected) | ~proven.certified))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        proves = (
            f"class {selected[first]}, radius {format_radius(proven.radius[first])}"
            if proven.certified[first]
            else "no certificate"
        )
        raise UserError(
            f"{path}, image {table.idx[first]}: predict={table.predict[first]}, radius={table.radius[first]:f} do not"
            f" follow from the counts, which prove {proves}; certify again, or recompute with --alpha"
        )


def _units(radius: Any) -> np.ndarray:
    """Radii in units of the last written digit."""
    return np.rint(np.asarray(radius) * 1e6)
