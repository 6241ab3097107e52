"""Shards: which images, merged to the file of one call, and every kind of file that does not belong together."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.merge import merge
from rs_consistency.certificates.proof import rows_of_counts
from rs_consistency.certificates.question import columns_of_counts
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.record import Settings
from rs_consistency.certificates.selection import Selection, Shard, parse_shard
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import replace_atomically
from rs_consistency.smoothing.votes import Votes
from tests.helpers import rows

SETTINGS = {"sigma": 0.5, "n0": 100, "n": 100, "alpha": 0.001, "seed": 0, "bound": "clopper_pearson"}
IDENTITY = {**SETTINGS, "data_digest": "d", "parameter_digest": "p"}
WHOLE = Selection(split_size=41, skip=2, most=20)


def results(indices):
    """Rows that depend on the images alone, but for the time."""
    counts = np.stack([np.roll([90 - i, i, 10], i) for i in indices])  # 100 votes each
    columns = columns_of_counts(CERTIFY, Votes(counts, counts), indices % 3)
    about = {"idx": indices, "label": indices % 3, "time": np.random.default_rng().uniform()}
    return rows_of_counts(CERTIFY, Settings(**SETTINGS), about | columns)


def write(path, selection, *, device="cpu", images=None, **changed):
    file = CertificateFile(
        path,
        schema=CERTIFY,
        identity={**IDENTITY, **changed},
        about={"device": device, "versions": {"jax": "1"}, "config": {"x": 1}},
        selection=selection,
    )
    file.append(results(file.remaining[:images][::-1]))
    file.finish()
    file.close()
    return path


@pytest.fixture
def shards(tmp_path):
    """The files of four shards."""
    made = [Shard(i, 4) for i in range(1, 5)]
    return [
        write(tmp_path / f"certificates{each.suffix}.tsv", WHOLE._replace(shard=each), device=f"gpu {each}")
        for each in made
    ]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "all.tsv"


def change_record(path, **changed):
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, **changed}))


def test_shards_are_read_as_they_are_written():
    assert parse_shard("2/5") == Shard(index=2, count=5) and str(Shard(2, 5)) == "2/5"
    assert parse_shard("1/1") == (1, 1) and parse_shard("12/12") == (12, 12)
    assert Shard(2, 5).suffix == "-2-of-5"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "0/5",
        "6/5",
        "2/0",
        "-1/5",
        "2/5/7",
        "2 /5",
        "2/5\n",
        "02/5",
        "a/b",
        "1.0/2",
        "²/5",
        None,
        "1/" + 5000 * "9",
    ],
)
def test_other_shards_are_refused(text):
    with pytest.raises(UserError, match=r"^shard=.*: use I/K, share I of K with 1 <= I <= K, such as 2/5$"):
        parse_shard(text)


def test_the_parts_of_all_shards_are_the_whole_and_alike():
    indices = np.arange(0, 103, 3)
    parts = [Shard(i, 4).part(indices) for i in range(1, 5)]
    assert sorted(np.concatenate(parts)) == indices.tolist()
    assert {len(part) for part in parts} == {8, 9}
    assert max(part.mean() for part in parts) - min(part.mean() for part in parts) < 10


def test_a_selection_is_what_skip_max_and_shard_say():
    assert Selection(10, 3).indices().tolist() == [0, 3, 6, 9]
    assert Selection(9, 3).indices().tolist() == [0, 3, 6]
    assert Selection(10, 3, 2).indices().tolist() == [0, 3]
    assert Selection(10, 3, 99).size == 4
    second = Selection(10, 3, 2, Shard(2, 2))
    assert second.indices().tolist() == [3] and second.images == range(3, 6, 6)
    assert len(Selection(2**31, 3, None, Shard(2, 2)).images) == 357_913_941  # at no cost
    with pytest.raises(UserError, match="shard=5/5: there are only 4 images; use at most so many shards"):
        Selection(10, 3, None, Shard(5, 5)).indices()


def test_merged_shards_are_the_file_of_one_call(shards, output, tmp_path):
    one = write(tmp_path / "one.tsv", WHOLE)
    done = merge([shards[i] for i in (2, 0, 3, 1)], output)
    assert rows(output) == rows(one) and done.images == 20
    lines = {line for path in shards for line in path.read_text().splitlines()}
    assert set(output.read_text().splitlines()) == lines  # times and all
    record, of_one = (json.loads(path.with_suffix(".json").read_text()) for path in (output, one))
    for key in (*of_one["identity"], "identity", "max", "config"):
        assert record[key] == of_one[key], key
    assert record["shard"] is None
    assert [part["shard"] for part in record["shards"]] == ["1/4", "2/4", "3/4", "4/4"]
    table = read_table(output)
    assert [each["device"] for each in table.record.provenances()] == ["gpu 1/4", "gpu 2/4", "gpu 3/4", "gpu 4/4"]
    assert not table.changed and not table.missing and record["finished"]["images"] == 20
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert merge(shards, output) == done  # again: nothing changes
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_merged_file_can_be_continued(shards, output, tmp_path):
    merge(shards, output)
    write(output, WHOLE._replace(most=None))
    assert rows(output) == rows(write(tmp_path / "one.tsv", WHOLE._replace(most=None)))
    assert len(rows(output)) == 22


def test_a_shard_that_was_not_put_in_order_is_merged(shards, output, tmp_path):
    header, *lines = shards[1].read_text().splitlines(keepends=True)
    shards[1].write_text("".join([header, *lines[::-1]]))
    record = json.loads(shards[1].with_suffix(".json").read_text())
    del record["finished"]  # killed before
    shards[1].with_suffix(".json").write_text(json.dumps(record))
    merge(shards, output)
    assert rows(output) == rows(write(tmp_path / "one.tsv", WHOLE))


def refused(paths, output, message):
    before = sorted(output.parent.iterdir())
    with pytest.raises(UserError, match=message) as error:
        merge(paths, output)
    assert "\n" not in str(error.value)
    assert sorted(output.parent.iterdir()) == before
    return str(error.value)


def test_mixtures_are_refused(shards, output, tmp_path):
    other = write(tmp_path / "b.tsv", WHOLE._replace(shard=Shard(2, 4)), sigma=1.0, parameter_digest="q")
    message = refused([shards[0], other, *shards[2:]], output, r"\(sigma: 0.5 -> 1.0; parameter_digest: 'p' -> 'q'\)")
    assert f"{shards[0]} and {other} are no shards of one certification" in message
    other = write(tmp_path / "c.tsv", WHOLE._replace(shard=Shard(2, 5)))
    refused([shards[0], other], output, "shard: '1/4' -> '2/5'")
    other = write(tmp_path / "d.tsv", WHOLE._replace(shard=Shard(2, 4), most=None))
    refused([shards[0], other], output, "max: 20 -> 21")
    other = write(tmp_path / "e.tsv", WHOLE._replace(shard=Shard(2, 4)), extra=1)
    refused([shards[0], other], output, "extra: None -> 1")
    refused([other, shards[0]], output, "extra: 1 -> None")


def test_a_shard_given_twice_or_not_at_all_is_refused(shards, output, tmp_path):
    refused([*shards, shards[1]], output, r"-2-of-4.tsv and .*-2-of-4.tsv are both shard 2/4; give each shard once")
    copy = write(tmp_path / "copy.tsv", WHOLE._replace(shard=Shard(2, 4)))
    refused([*shards, copy], output, r"-2-of-4.tsv and .*copy.tsv are both shard 2/4")
    refused(shards[::3], output, "shard 2/4, 3/4 is missing; make it with certify.py --shard=2/4, and give its file")
    refused([], output, "merge=.*: give the .tsv files of all shards")


def test_images_of_another_shard_are_refused(shards, output):
    change_record(shards[1], shard="3/4")
    refused(shards, output, r"-2-of-4.tsv, line 2, is not what .* image 2 is none of those asked for")


def test_an_unfinished_shard_is_refused_with_the_way_to_continue(shards, output):
    shards[2].unlink()
    write(shards[2], WHOLE._replace(shard=Shard(3, 4)), images=3)
    missing = r"-3-of-4.tsv lacks 2 of 5 images, such as 28; continue it: "
    refused(shards, output, missing + "python certify.py with its settings and --shard=3/4")
    change_record(shards[2], command="python certify.py --workdir=w --shard=3/4")
    refused(shards, output, missing + "python certify.py --workdir=w --shard=3/4$")
    shards[2].write_text(shards[2].read_text()[:-5])
    refused(shards, output, "lacks 3 of 5 images")


def test_damaged_and_changed_shards_are_refused(shards, output):
    good = shards[0].read_text()
    shards[0].write_text(good.replace("\t0.", "\tx.", 1))
    refused(shards, output, r"-1-of-4.tsv, line 2, is not what this program wrote .*: damaged\)")
    lines = good.splitlines(keepends=True)
    shards[0].write_text("".join([*lines, lines[1]]))
    refused(shards, output, r"line 7, .* image 0 for the second time")
    shards[0].write_text(good.replace("0:00:00.", "0:00:09.", 1))
    refused(shards, output, r"-1-of-4.tsv was changed after it was finished")
    shards[0].write_text("")
    refused(shards, output, "not those of this program")
    shards[0].write_text(good)
    merge(shards, output)


def test_files_that_are_no_shards_are_refused(shards, output, tmp_path):
    one = write(tmp_path / "one.tsv", WHOLE)
    refused([one], output, "one.tsv is not the file of a shard")
    refused([tmp_path / "none.tsv"], output, "none.tsv does not exist")
    refused([tmp_path / "c.json"], output, "the name must end in .tsv")
    record = one.with_suffix(".json")
    record.write_text('{"a": 1}')
    refused([one], output, "one.json is no record of a certification")
    record.unlink()
    refused([one], output, "one.tsv has no one.json")
    for changed in ({"shard": "9/4"}, {"max": "x"}, {"split_size": None}):
        before = shards[0].with_suffix(".json").read_text()
        change_record(shards[0], **changed)
        refused(shards, output, r"-1-of-4.json is damaged: ")
        shards[0].with_suffix(".json").write_text(before)
    change_record(shards[0], identity=["sigma", "skip", "shard", "split_size", "gone"])
    refused(shards, output, r"-1-of-4.json is damaged: it lacks mode, n, .*, gone; restore it")


def test_an_output_with_another_content_is_left_alone(shards, output, tmp_path):
    output.write_text("mine")
    refused(shards, output, "output=.*all.tsv is there already with another content; choose another --output")
    assert output.read_text() == "mine"
    output.unlink()
    output.with_suffix(".json").write_text('{"notes": 1}')
    refused(shards, output, "all.json is there already and is no record of a certification")
    with pytest.raises(UserError, match="its folder does not exist"):
        merge(shards, tmp_path / "nowhere" / "all.tsv")
    refused(shards, tmp_path / "all.txt", "the name must end in .tsv")
    (tmp_path / "link.tsv").symlink_to(shards[2])
    refused(shards, tmp_path / "link.tsv", "is one of the files to merge")


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("mine")])
def test_an_output_that_another_process_takes_away_is_no_success(shards, output, monkeypatch, change):
    @contextmanager
    def replaced(path):
        with replace_atomically(path) as temporary:
            yield temporary
        change(path)

    monkeypatch.setattr("rs_consistency.certificates.merge.replace_atomically", replaced)
    with pytest.raises(UserError, match=r"output=.*all\.tsv or all\.json was replaced by another process meanwhile"):
        merge(shards, output)


def test_a_kill_during_a_merge_leaves_nothing_half(shards, output, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("rs_consistency.certificates.merge.replace_atomically", killed)  # after the record
        with pytest.raises(Killed):
            merge(shards, output)
    assert not output.exists()
    merge(shards, output)
    expected = output.read_text()
    output.with_suffix(".json").unlink()  # as a careless copy leaves it
    merge(shards, output)
    assert output.read_text() == expected and not read_table(output).changed
    shutil.copy(shards[0].with_suffix(".json"), output.with_suffix(".json"))
    merge(shards, output)
    assert not read_table(output).changed
