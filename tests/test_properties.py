"""Arbitrary files and counts: readers refuse in a line or read the same; bounds are monotone and never too high.

A few examples, always the same, in `make test`; many, with the seed of the suite, in `make test-faults`, which sets
RS_CONSISTENCY_EXAMPLES.
"""

import contextlib
import gzip
import json
import os
import resource
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rs_consistency.certificates.columns import format_radius
from rs_consistency.certificates.proof import load
from rs_consistency.certificates.read import read_table, standing
from rs_consistency.cli.train import parse
from rs_consistency.common.errors import UserError
from rs_consistency.statistics import exact, sequential
from rs_consistency.statistics.allocation import votes_for_tolerance
from rs_consistency.statistics.bounds import (
    BOUNDS,
    certify_votes,
    lower_confidence_bound,
    p_value_of,
    radius_ceiling,
    upper_confidence_bound,
)
from rs_consistency.training.metrics import read_lines
from rs_consistency.training.runs import read_config
from tests.certificates.test_exact_lines import FLOAT, KINDS, honest
from tests.helpers import ROOT

_MANY = os.environ.get("RS_CONSISTENCY_EXAMPLES")


def examples(number):
    """Settings of a test: so many examples, or as many times more as the suite of faults asks for."""
    return settings(
        max_examples=number * int(_MANY or 1),
        derandomize=not _MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# --- readers


def _own(folder, kind):
    return honest(folder / "certificates.tsv", kind, FLOAT)


def _packed(folder):
    path = _own(folder, BOUNDS[0])
    packed = path.with_suffix(".tsv.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    return packed


def _foreign(folder):
    path = folder / "theirs.csv"
    path.write_text(
        "idx,label,predict,radius,correct,time\n0,7,7,0.853,1,0:00:11.9\n10,2,-1,0.0,0,0:00:11.9\n20,1,4,1.25,0,12\n"
    )
    return path


def _config(folder):
    path = folder / "config.json"
    path.write_text(parse([f"--config={ROOT}/configs/mnist.py"]).config.to_json(indent=2))
    return path


def _metrics(folder):
    path = folder / "metrics.jsonl"
    lines = [{"epoch": epoch, "step": 7 * epoch, "loss": 2.5 / epoch, "lr": 0.01} for epoch in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _read_own(path):
    """Return the lines of a file of this program, and its certificates."""
    rows, (certificates, _) = read_table(path).rows, load(path)
    standing(path)
    return rows, [column.tolist() for column in certificates[:-1]]


def _read_foreign(path):
    certificates, _ = load(path)
    standing(path)
    assert len({len(column) for column in certificates[:-1]}) == 1
    assert np.isfinite(certificates.radius).all() and (certificates.radius >= 0).all()
    return None  # nothing but the lines themselves says what they were


def _read_metrics(path):
    assert all(isinstance(record["epoch"], int) for record in read_lines(path))


def _read_config(path):
    read_config(path.parent)


READERS = {
    **{kind: (lambda folder, kind=kind: _own(folder, kind), _read_own) for kind in KINDS},
    "packed": (_packed, _read_own),
    "foreign": (_foreign, _read_foreign),
    "config": (_config, _read_config),
    "metrics": (_metrics, _read_metrics),
}
_TOKENS = [
    *(b"", b"-1", b"0", b"1e400", b"-1e400", b"nan", b"inf", b"1" * 30, b"0.5", b"true", b"null", b"\t", b",", b";"),
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b"[" * 3000,
        b"{}",
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        "٣".encode(),
    ),
]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**18, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def edits(draw, content):
    """Content after some insertions, deletions, replacements, repetitions, swaps of bytes, cells, lines, or values."""
    unit = draw(st.sampled_from([None, b"\n", b"\t", b",", b" ", "json"]))
    if unit == "json":
        with contextlib.suppress(ValueError):
            return _with_value(draw, json.loads(content))
        unit = b"\n"
    for _ in range(draw(st.integers(1, 3))):
        parts = [content[i : i + 1] for i in range(len(content))] if unit is None else content.split(unit)
        first, second = (draw(st.integers(0, max(0, len(parts) - 1))) for _ in range(2))
        new = draw(st.sampled_from(_TOKENS) | st.binary(max_size=4))
        kind = draw(st.sampled_from(["insert", "delete", "replace", "repeat", "swap", "cut"]))
        if not parts:
            parts = [new]
        elif kind == "insert":
            parts.insert(first, new)
        elif kind == "delete":
            del parts[first]
        elif kind == "replace":
            parts[first] = new
        elif kind == "repeat":
            parts.insert(second, parts[first])
        elif kind == "swap":
            parts[first], parts[second] = parts[second], parts[first]
        else:
            del parts[first:]
        content = (unit or b"").join(parts)
    return content


def _with_value(draw, value):
    """JSON with one value replaced, removed or renamed, at any depth."""
    places, todo = [], [value]
    while todo:
        each = todo.pop()
        inner = list(each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ())
        places += [(each, key) for key, _ in inner]
        todo += [child for _, child in inner]
    assume(places)
    home, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["replace", "delete", "rename"]))
    if kind == "replace":
        home[key] = draw(_VALUES)
    else:
        old = home.pop(key)
        if kind == "rename" and isinstance(home, dict):
            home[draw(st.text(max_size=3))] = old
    return json.dumps(value).encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def bounded():
    """Refuse a GiB of memory, and 10 CPU seconds, to the block."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, limits = time.process_time(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - before < 10


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The content of the files of each reader, by name, with the path of the first and what it reads."""
    found = {}
    for kind, (write, read) in READERS.items():
        folder = tmp_path_factory.mktemp("original")
        path = write(folder)
        files = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
        found[kind] = files, path.name, read(path)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("edited")


@given(data=st.data())
@examples(250)
def test_readers_refuse_in_a_line_or_read_the_same(originals, folder, data):
    kind = data.draw(st.sampled_from(list(READERS)))
    files, name, wanted = originals[kind]
    edited = data.draw(st.sampled_from(sorted(files)))
    old = files[edited]
    packed = edited.endswith(".gz") and data.draw(st.booleans())
    new = data.draw(st.binary(max_size=60) | edits(gzip.decompress(old) if packed else old))
    for each in folder.iterdir():
        each.unlink()
    for each, content in files.items():
        (folder / each).write_bytes(content)
    (folder / edited).write_bytes(gzip.compress(new) if packed else new)
    check(READERS[kind][1], folder / name, wanted)


def check(read, path, wanted):
    try:
        with bounded():
            found = read(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return
    assert found == wanted


@pytest.mark.parametrize(
    "broken",
    [
        lambda path: json.loads(path.read_text()),  # a raw error
        lambda path: (_ for _ in ()).throw(UserError("two\nlines")),
        lambda path: path.read_bytes(),  # another value
        lambda path: np.zeros(2**28)[:1].tolist(),  # too much memory
    ],
)
def test_a_broken_reader_does_not_pass(tmp_path, broken):
    path = tmp_path / "file"
    path.write_text("[[")
    with pytest.raises((AssertionError, ValueError, MemoryError)) as found:
        check(broken, path, b"[")
    assert found.type is not UserError


# --- bounds

ALPHAS = st.floats(1e-12, 0.5)


@st.composite
def counts(draw, most=10**5):
    n = draw(st.integers(1, most))
    count = draw(st.integers(0, n) | st.integers(max(0, n - 20), n))
    return n, count, draw(st.integers(0, n - count))


def check_radii(certify, counts, alpha, other, uniform, bound):
    n, count, runner_up = counts
    about = {"sigma": 0.5, "bound": bound, "uniform": uniform}

    def radius(count, runner_up, n, alpha):
        return float(certify(count, runner_up, n, alpha=alpha, **about).radius)

    low, high = sorted([alpha, other])
    here = radius(count, runner_up, n, low)
    assert here <= radius(count, runner_up, n, high)
    assert here <= radius(count + 1, runner_up, n + 1, low)
    if count + runner_up < n:
        assert here <= radius(count + 1, runner_up, n, low)
        assert here >= radius(count, runner_up + 1, n, low)
    if bound == "clopper_pearson" or count < n:  # randomized uses no draw where all votes agree
        assert here >= radius(count, min(runner_up, n - count), n + 1, low)
    assert here <= radius_ceiling(n, alpha=low, sigma=0.5, bound=bound)
    if here > 0:
        facts = {"sigma": 0.5, "alpha": low, "bound": bound, "runner_up": runner_up, "uniform": uniform}
        assert exact.proves_radius(n, count, Decimal(format_radius(here)), **facts, alpha_share=0.99)


@given(counts=counts(), alpha=ALPHAS, other=ALPHAS, uniform=st.floats(1e-9, 1), bound=st.sampled_from(BOUNDS))
@examples(60)
def test_radii_are_monotone_and_proven(counts, alpha, other, uniform, bound):
    check_radii(certify_votes, counts, alpha, other, uniform, bound)


def _changed(*, factor=1.0, count=0.0, n=0.0):
    def certify(counted, runner_up, votes, **settings):
        proven = certify_votes(counted, runner_up, votes, **settings)
        return proven._replace(radius=factor * proven.radius + count * counted + n * votes)

    return certify


@pytest.mark.parametrize("broken", [_changed(factor=1.0001), _changed(count=-0.1), _changed(n=-0.1), _changed(n=0.1)])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_that_is_too_high_or_not_monotone_does_not_pass(broken, bound):
    case = (1000, 900, 50), 0.001, 0.002, 0.5, bound
    check_radii(certify_votes, *case)
    with pytest.raises(AssertionError):
        check_radii(broken, *case)


@given(counts=counts(), alpha=ALPHAS, other=ALPHAS)
@examples(60)
def test_confidence_bounds_are_monotone_and_enclose_the_share(counts, alpha, other):
    n, count, _ = counts
    low, high = sorted([alpha, other])
    for bound, sign in ((lower_confidence_bound, 1), (upper_confidence_bound, -1)):
        here = bound(count, n, low)
        assert sign * here <= sign * bound(count, n, high) and sign * here <= sign * count / n
        assert bound(count, n + 1, low) <= here <= bound(count + 1, n + 1, low)
        assert count == n or here <= bound(count + 1, n, low)


@given(counts=counts(3000), radius=st.floats(0, 2), larger=st.floats(0, 2), alpha=ALPHAS, other=ALPHAS)
@examples(60)
def test_decisions_are_monotone_and_proven(counts, radius, larger, alpha, other):
    votes, hits, _ = counts
    (near, far), (low, high) = sorted([radius, larger]), sorted([alpha, other])

    def decision(hits, radius, alpha):
        return int(sequential.decide(hits, votes, radius=radius, sigma=0.5, alpha=alpha))

    here = decision(hits, near, low)
    assert decision(hits, far, low) <= here
    assert hits == votes or here <= decision(hits + 1, near, low)
    assert here in (sequential.UNDECIDED, decision(hits, near, high))
    if here != sequential.UNDECIDED:
        certified = here == sequential.CERTIFIED
        assert exact.proves_decision(hits, votes, near, certified=certified, sigma=0.5, alpha=low)


@given(counts=counts(3000))
@examples(60)
def test_p_values_are_monotone_and_proven(counts):
    n, count, runner_up = counts
    most, runner_up = max(count, runner_up), min(count, runner_up)
    value = float(p_value_of(most, runner_up))
    assert 1 >= value >= float(p_value_of(most + 1, runner_up)) >= 0
    if 1e-100 < value < 0.5:
        assert exact.proves_prediction(n, most, runner_up, alpha=value * (1 + 1e-9))
        assert not exact.proves_prediction(n, most, runner_up, alpha=value * (1 - 1e-6))


@given(count0=st.integers(0, 99), n=st.integers(10, 2000), tolerance=st.floats(0.001, 1), other=st.floats(0.001, 1))
@examples(10)
def test_votes_are_monotone(count0, n, tolerance, other):
    less, more = sorted([tolerance, other])

    def votes(count0, tolerance):
        return int(votes_for_tolerance(count0, n0=100, n=n, tolerance=tolerance, alpha=0.001, sigma=0.5))

    here = votes(count0, less)
    assert votes(count0, more) <= here <= votes(count0 + 1, less) <= n
