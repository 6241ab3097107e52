"""Audits: honest files pass, every forged cell is found, other devices are named."""

import json

import jax
import numpy as np
import pytest

import rs_consistency
from rs_consistency import noise
from rs_consistency.certificates import audit
from rs_consistency.certificates.columns import CERTIFY, DECIDE, PREDICT, make_rows
from rs_consistency.certificates.proof import rows_of_counts
from rs_consistency.certificates.question import columns_of_counts
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.votes import Votes, count_votes, vote_settings
from rs_consistency.statistics.bounds import BOUNDS, certify_votes, p_value_of

SETTINGS = {"sigma": 0.5, "n0": 20, "n": 300, "alpha": 0.001, "seed": 3, "parameter_digest": "p", "data_digest": "d"}
HERE = {"device": "8 x cpu", "versions": {"jax": "1", "scipy": "2"}, "code_digest": "c"}
INDICES = np.arange(0, 60, 2)
LABELS = INDICES % 3


def drawn(indices):
    """Votes that depend on the image alone: some clear, some close, for three classes."""
    counts = []
    for index in indices:
        draw = np.random.default_rng(index)
        share = draw.dirichlet([0.3, 0.3, 0.3])
        counts.append((draw.multinomial(20, share), draw.multinomial(300, share)))
        if index == 2:  # the one that is forged
            counts[-1] = np.array([0, 0, 20]), np.array([0, 2, 298])
    return Votes(*(np.stack(each) for each in zip(*counts, strict=True)))


def save(path, schema, identity, rows):
    file = CertificateFile(
        path, schema=schema, identity=identity, about=HERE, selection=Selection(60, 2, most=len(rows))
    )
    file.append(rows)
    file.finish()
    file.close()
    return path


def certified(path, bound="clopper_pearson"):
    votes = drawn(INDICES)
    selected = votes.counts0.argmax(1)
    count = votes.counts[np.arange(30), selected]
    others = np.where(np.arange(3) == selected[:, None], 0, votes.counts).max(1)
    found = certify_votes(
        count, others, 300, alpha=0.001, sigma=0.5, bound=bound, uniform=noise.bound_uniform(3, INDICES)
    )
    counts = {"count0": votes.counts0.max(1), "count": count, "count_runner_up": others, "selected": selected}
    counts |= {"count_label": votes.counts[np.arange(30), LABELS], "votes": 300}
    prediction = np.where(found.certified, selected, -1)
    rows = make_rows(idx=INDICES, label=LABELS, predict=prediction, radius=found.radius, time=0.1, **counts)
    share = {"alpha_share": 0.99} if bound == "two_class" else {}
    return save(path, CERTIFY, {**SETTINGS, "bound": bound, **share}, rows)


@pytest.fixture
def path(tmp_path):
    return certified(tmp_path / "c.tsv")


def verify(path, indices=INDICES[:10], *, votes=None, here=HERE):
    table = read_table(path)
    votes = drawn(indices) if votes is None else votes
    return audit.compare(table, redrawn_rows(table, indices, indices % 3, votes), here)


def redrawn_rows(table, indices, labels, votes):
    """The rows of fresh votes at the recorded settings."""
    columns = {"idx": indices, "label": labels, "time": 0.0, **columns_of_counts(CERTIFY, votes, labels)}
    return rows_of_counts(CERTIFY, table.record.settings, columns)


def forge(path, index, *, with_digest=True, **cells):
    """Changes cells of an image's line, and of the record what would give the change away."""
    header, *lines = path.read_text().splitlines()
    place = [line.split("\t")[0] for line in lines].index(str(index))
    line = dict(zip(header.split("\t"), lines[place].split("\t"), strict=True))
    lines[place] = "\t".join({**line, **{name: str(value) for name, value in cells.items()}}.values())
    path.write_text("\n".join([header, *lines]) + "\n")
    if with_digest:
        record = json.loads(path.with_suffix(".json").read_text())
        record.pop("finished", None)
        path.with_suffix(".json").write_text(json.dumps(record))
    return line


@pytest.mark.parametrize("bound", BOUNDS)
def test_an_honest_file_reproduces(tmp_path, bound):
    path = certified(tmp_path / "c.tsv", bound)
    report = verify(path)
    assert report.ok and report.reproduced == report.drawn == 10 and report.total == 30 and not report.notes
    proven = "; all 30 are proven in whole numbers"
    assert report.text() == f"10 of 10 lines reproduce; of all 30, at most 25.9% do not, with 95% confidence{proven}"
    assert verify(path, INDICES).text() == f"30 of 30 lines reproduce{proven}"
    predicted = {row["predict"] for row in read_table(path).rows.values()}
    assert -1 in predicted and len(predicted) > 2  # or the file is too easy


def test_votes_of_a_model_reproduce_and_those_of_another_do_not(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(6, 4, 4, 1)).astype(np.uint8)
    weights = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    settings = {"sigma": 0.5, "n0": 20, "n": 300, "seed": 3}
    result = rs_consistency.certify(
        lambda batch: batch.reshape(-1, 16) @ weights,
        images,
        num_classes=3,
        indices=range(0, 12, 2),
        batch_size=64,
        devices=jax.devices()[:1],
        **settings,
    )
    counts = columns_of_counts(CERTIFY, Votes(result.counts0, result.counts), np.zeros(6, int))
    rows = make_rows(idx=range(0, 12, 2), label=0, predict=result.prediction, radius=result.radius, time=0.1, **counts)
    on_grid = {"sampler": "grid", "grid_steps": 255, "image_shape": [4, 4, 1], "precision": "highest"}
    path = save(tmp_path / "c.tsv", CERTIFY, {**SETTINGS, **on_grid, "bound": "clopper_pearson"}, rows)
    chosen = np.array([2, 8])
    checked = vote_settings(**settings, num_classes=3, batch_size=64, image_shape=(4, 4, 1), devices=jax.devices()[:1])
    for change, ok in {0.0: True, 0.3: False}.items():
        (votes,) = count_votes(
            lambda variables, batch: batch.reshape(-1, 16) @ variables,
            weights + change * weights[::-1],
            images[chosen // 2],
            chosen,
            settings=checked,
            devices=jax.devices()[:1],
        )
        table = read_table(path)
        report = audit.compare(table, redrawn_rows(table, chosen, np.zeros(2, int), votes), HERE)
        assert report.ok == ok and report.reproduced == (2 if ok else 0)


def test_the_bounds_differ_so_that_a_wrong_one_is_found(tmp_path):
    radii = [
        [str(row["radius"]) for row in read_table(certified(tmp_path / f"{b}.tsv", b)).rows.values()] for b in BOUNDS
    ]
    assert radii[0] != radii[1] and radii[0] != radii[2]
    for bound in BOUNDS[1:]:
        path = tmp_path / f"{bound}.tsv"
        record = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**record, "bound": "clopper_pearson"}))
        assert not verify(path).ok


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"radius": "0.900000"}, "radius 0.900000, its counts give 0."),
        ({"label": 1}, "label 1, drawn again 2"),
        ({"label": 1}, "correct 1, its counts give 0"),
        ({"label": 1, "correct": 0}, "label 1, drawn again 2, correct 0, drawn again 1"),
        ({"count": 299, "count_runner_up": 1}, "count 299, drawn again 298"),
        ({"count0": 19}, "count0 19, drawn again 20"),
        ({"count_runner_up": 1}, "count_runner_up 1, drawn again 2"),
        ({"selected": 1}, "predict 2, its counts give 1"),
        ({"predict": 1, "selected": 1, "correct": 0}, "selected 1, drawn again 2"),
        ({"predict": -1, "radius": "0.000000", "correct": 0}, "predict -1, its counts give 2"),
        ({"count": 301}, "its counts cannot be with n0=20 and n=300"),
        ({"count0": 21}, "its counts cannot be with n0=20 and n=300"),
        ({"count_runner_up": 3}, "its counts cannot be with n0=20 and n=300"),
    ],
)
def test_forged_lines_are_found(path, cells, message):
    line = forge(path, 2, **cells)
    assert (line["count"], line["count_runner_up"], line["selected"], line["label"]) == ("298", "2", "2", "2")
    report = verify(path)
    assert not report.ok and report.reproduced == 9
    (problem,) = report.text().splitlines()[:-1]
    assert problem.startswith("image 2: ") and message in problem
    assert report.text().splitlines()[-1].startswith("9 of 10 lines reproduce")


def test_a_line_that_contradicts_itself_is_found_without_drawing_it(path):
    forge(path, 58, radius="1.500000")
    report = verify(path)
    assert report.reproduced == report.drawn == 10 and not report.ok
    assert report.text().startswith("image 58: radius 1.500000, its counts give ")
    assert report.text().endswith("\n10 of 10 lines reproduce; 29 of 30 are proven in whole numbers")


def test_a_change_that_no_count_shows_is_found_by_the_digest(path):
    forge(path, 58, time="0:00:00.000001", with_digest=False)
    report = verify(path)
    assert not report.ok and report.reproduced == 10
    assert "c.tsv was changed after it was finished: its SHA-256 is not the one in c.json" in report.text()


def test_a_label_or_a_class_that_the_dataset_has_not_is_found_without_drawing_it(path):
    table, truth = read_table(path), {"labels": LABELS, "num_classes": 3}
    (row,) = (row for row in redrawn_rows(table, INDICES[-1:], LABELS[-1:], drawn(INDICES[-1:])))
    redrawn = redrawn_rows(table, INDICES[:10], LABELS[:10], drawn(INDICES[:10]))
    assert audit.compare(table, redrawn, HERE, **truth).ok
    forge(path, 58, label=row["label"] + 1, correct=0)
    report = audit.compare(read_table(path), redrawn, HERE, **truth)
    assert not report.ok and f"label {row['label'] + 1}, in the dataset {row['label']}" in report.problems[58]
    forge(path, 58, label=row["label"], correct=row["correct"])
    report = audit.compare(read_table(path), redrawn, HERE, **truth | {"num_classes": 2})
    assert any("selected 2 is no class" in text for text in report.problems.values())


def test_another_seed_or_model_does_not_reproduce(path):
    report = verify(path, votes=drawn(INDICES[:10] + 1))
    assert report.reproduced == 0 and len(report.text().splitlines()) == 11
    assert report.largest_difference > 50


def test_another_device_is_named_and_does_not_excuse(path):
    votes = drawn(INDICES[:10])
    flipped = votes.counts.copy()
    flipped[3] += np.array([-2, 2, 0]) if flipped[3, 0] >= 2 else np.array([2, -2, 0])
    here = {**HERE, "device": "1 x gpu", "versions": {"jax": "9", "scipy": "2"}}
    report = verify(path, votes=Votes(votes.counts0, flipped), here=here)
    assert not report.ok and report.reproduced == 9 and report.largest_difference == 2
    lines = report.text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("image 6: ")
    assert lines[1] == (
        "note: made with another device, jax (8 x cpu, jax 1) than drawn again now (1 x gpu, jax 9): rounding can"
        " decide near-ties between classes differently, or change the last digit of a radius"
    )
    assert lines[2].startswith("9 of 10 lines reproduce, largest difference 2 votes; all 30 ")
    assert verify(path, here=here).ok and "rounding" in verify(path, here=here).text()
    assert "another code_digest" in verify(path, here={**HERE, "code_digest": "other"}).text()


def test_an_unfinished_file_is_told(path):
    forge(path, 0)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:21]))
    report = verify(path)
    assert report.ok and report.notes == ["the file is not finished: it holds 20 of 30 images"]


def test_decisions_and_predictions(tmp_path):
    decided = make_rows(
        idx=INDICES[:3],
        label=LABELS[:3],
        predict=[1, -1, -1],
        radius=[0.75, 0.0, 0.0],
        time=1,
        count0=[10, 8, 6],
        count=[160, 20, 280],
        votes=[160, 64, 300],
        selected=[1, 0, 2],
        decision=["certified", "not_certified", "undecided"],
    )
    path = save(tmp_path / "d.tsv", DECIDE, {**SETTINGS, "radius": 0.75, "look_every": 16}, decided)
    assert audit.compare(read_table(path), decided, HERE).text().startswith("3 of 3 lines reproduce; all 3 ")
    fewer = [{**decided[0], "votes": 144}, *decided[1:]]
    assert "image 0: votes 160, drawn again 144" in audit.compare(read_table(path), fewer, HERE).text()
    forge(path, 0, radius="0.800000")
    forge(path, 4, decision="certified")
    forge(path, 2, votes=16)
    text = audit.compare(read_table(path), decided, HERE).text()
    assert "image 0: radius 0.800000, its counts give 0.750000" in text
    assert "image 2: its counts cannot be with n0=20 and n=300" in text
    assert "image 4: predict -1, its counts give 2" not in text
    assert "image 4: decision certified, its counts give undecided" in text
    forge(path, 4, decision="undecided", votes=288, count=268)
    text = audit.compare(read_table(path), decided, HERE).text()
    assert "image 4: decision undecided, its counts give none before more votes" in text

    predicted = make_rows(
        idx=INDICES[:2],
        label=LABELS[:2],
        predict=[1, -1],
        radius=0.0,
        time=0,
        count=[90, 51],
        count_runner_up=[10, 49],
        p_value=p_value_of([90, 51], [10, 49]),
        count_label=[10, 51],
    )
    path = save(tmp_path / "p.tsv", PREDICT, SETTINGS, predicted)
    assert audit.compare(read_table(path), predicted, HERE).ok
    forge(path, 0, p_value="0.0001")
    assert "image 0: p_value 0.0001, its counts give" in audit.compare(read_table(path), predicted, HERE).text()
    forge(path, 2, predict=2, correct=1)
    assert "image 2: predict 2, its counts give -1" in audit.compare(read_table(path), predicted, HERE).text()
    forge(path, 2, predict=-1, correct=0)
    forge(path, 0, predict=-1, correct=0, p_value=repr(float(p_value_of(90, 10))))
    assert "image 0: predict -1, its counts give a class" in audit.compare(read_table(path), predicted, HERE).text()
    forge(path, 0, predict=1, radius="0.100000", count=301)
    assert "image 0: its counts cannot be with n=300" in audit.compare(read_table(path), predicted, HERE).text()
    forge(path, 0, count=90)
    assert "radius 0.100000, its counts give 0.000000" in audit.compare(read_table(path), predicted, HERE).text()


def test_lines_are_chosen_evenly_and_by_the_seed(path):
    table = read_table(path)
    chosen = audit.choose_lines(table, 5, seed=1)
    assert len(set(chosen)) == 5 and set(chosen) <= set(INDICES) and (np.diff(chosen) > 0).all()
    assert (audit.choose_lines(table, 5, seed=1) == chosen).all()
    assert len({tuple(audit.choose_lines(table, 5)) for _ in range(5)}) > 1
    assert (audit.choose_lines(table, 99, seed=1) == INDICES).all()
    often = np.bincount(np.concatenate([audit.choose_lines(table, 5, seed) for seed in range(600)]))[::2]
    # Each of 30 lines has 100 chances of 600 on average, with a standard deviation of 9.1.
    assert often.min() > 100 - 5 * 9.1 and often.max() < 100 + 5 * 9.1
    with pytest.raises(UserError, match="verify=0: use a whole number of at least 1"):
        audit.choose_lines(table, 0)
    path.write_text(CERTIFY.header)
    with pytest.raises(UserError, match=r"c.tsv has no images yet; certify some first"):
        audit.choose_lines(read_table(path), 5)


def test_model_and_data_must_be_those_of_the_record(path):
    table = read_table(path)
    audit.check_binding(table, {"parameter_digest": "p", "data_digest": "d", "split_size": 60})
    message = r"c.json was made from something else \(parameter_digest: 'p' -> 'q'; split_size: 60 -> 61\); give the"
    with pytest.raises(UserError, match=message):
        audit.check_binding(table, {"parameter_digest": "q", "data_digest": "d", "split_size": 61})
    with pytest.raises(UserError, match=r"c.json lacks dtype: what it was made from is not known"):
        audit.check_binding(table, {"dtype": "float32"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 2}, "alpha=2"),
        ({"n0": "x"}, "n0='x'"),
        ({"sigma": -1}, "sigma=-1"),
        ({"bound": "mine"}, "is unknown"),
    ],
)
def test_settings_that_cannot_be_are_told(path, changed, message):
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, **changed}))
    with pytest.raises(UserError, match=message):
        verify(path)
    del record["sigma"]
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"c.json is damaged: it lacks sigma; restore it from a copy"):
        verify(path)
