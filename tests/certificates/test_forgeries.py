"""Forged files: whatever contradicts a line, a record or a digest is refused in one line, at a cost of the file's size.

The forger keeps the digest of the record up to date, where it is not the digest that must find him.
"""

import gzip
import hashlib
import json
import time
import tracemalloc
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from rs_consistency.certificates import read
from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, PREDICT, SCHEMAS
from rs_consistency.certificates.exact_lines import prove
from rs_consistency.certificates.merge import merge
from rs_consistency.certificates.proof import contradictions, load, rows_of_counts
from rs_consistency.certificates.read import read_table, standing
from rs_consistency.certificates.record import Settings
from rs_consistency.certificates.selection import Selection, Shard
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.reproduction.plan import Cell, deviations
from rs_consistency.reproduction.results import read_results

VOTES = {"sigma": 0.5, "n": 1000, "alpha": 0.001, "seed": 0, "sampler": "float", "precision": "default"}
OF_MODE = {
    CERTIFY: {"n0": 20, "bound": "clopper_pearson", "tolerance": None},
    DECIDE: {"n0": 20, "radius": 0.3, "look_every": 100},
    PREDICT: {},
    ATTACK: {"copies": 4, "steps": 5, "restarts": 1},
}
BINDING = {"parameter_digest": "p", "data_digest": "d", "dataset": "mnist", "split": "test"}
BINDING |= {"model": "lenet", "dtype": "float32"}
COUNT, RUNNER_UP = np.array([1000, 900, 520, 400, 900, 700]), np.array([0, 80, 470, 390, 60, 300])
SELECTED, LABEL = np.array([1, 2, 1, 0, 2, 0]), np.array([1, 2, 1, 0, 1, 2])
COLUMNS = {
    CERTIFY: {"count_runner_up": RUNNER_UP, "selected": SELECTED, "count0": 20, "votes": 1000},
    DECIDE: {"selected": SELECTED, "count0": 20, "votes": np.array([300, 1000, 1000, 1000, 1000, 1000])},
    PREDICT: {"count_runner_up": RUNNER_UP, "predict": SELECTED},
    ATTACK: {"count_runner_up": RUNNER_UP, "predict": 5, "adversarial": SELECTED, "distance": 0.25},
}
OF_LABEL = np.array([1000, 900, 520, 400, 40, 300])


def columns_of(schema):
    counts = {"count": np.where(np.arange(6) == 0, 300, COUNT) if schema is DECIDE else COUNT}
    counts |= {"count_label": OF_LABEL} if schema in (CERTIFY, PREDICT) else {}
    return {"idx": np.arange(6) * 2, "label": LABEL, "time": 0.1} | counts | COLUMNS[schema]


SIX = Selection(12, 2)


def honest(path, schema=CERTIFY, selection=SIX, about=None):
    """The images of a selection, of those of an honest file."""
    settings = VOTES | OF_MODE[schema]
    file = CertificateFile(
        path, schema=schema, identity={**settings, **BINDING}, about=about or {}, selection=selection
    )
    rows = rows_of_counts(schema, Settings(**settings), columns_of(schema))
    file.append([row for row in rows if row["idx"] in file.remaining])
    file.finish()
    file.close()
    return path


def change_record(path, **changed):
    """Changes keys of the record; ... removes a key."""
    record = path.with_suffix(".json")
    made = {**json.loads(record.read_text()), **changed}
    record.write_text(json.dumps({name: value for name, value in made.items() if value is not ...}))


def keep_digest(path, images=None):
    """Puts the digest of the lines as they are into the record, as a forger does."""
    content = path.read_bytes()
    images = content.count(b"\n") - 1 if images is None else images
    change_record(path, finished={"at": "", "images": images, "sha256": hashlib.sha256(content).hexdigest()})


def forge(path, image, **cells):
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    (line,) = (line for line in lines if line[0] == str(image))
    for name, value in cells.items():
        line[lines[0].index(name)] = str(value)
    path.write_text("".join("\t".join(line) + "\n" for line in lines))


def refused(path, message):
    """By every reader, packed or not, in one line."""
    packed = path.with_suffix(".tsv.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for each in (path, packed):
        with pytest.raises(UserError) as error:
            load(each)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert str(path.with_suffix("")) in str(error.value)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_honest_files_are_read(tmp_path, schema):
    path = honest(tmp_path / "c.tsv", schema)
    table, evidence = load(path)
    assert len(table.idx) == 6 and (evidence is not None) == (schema is CERTIFY)
    assert standing(path) == (True, "")
    assert 0 < np.mean(table.predict >= 0) < 1 or schema is ATTACK
    assert prove(path, evidence).lines == 6
    # A line may claim less, in a file that nobody calls finished.
    claim = {"adversarial": -1, "distance": "inf"} if schema is ATTACK else {"predict": -1, "radius": "0.000000"}
    claim |= {"correct": 0, **({"decision": "undecided"} if schema is DECIDE else {})}
    forge(path, 2, **claim)
    refused(path, "was changed after it was finished: its SHA-256 is not the one in c.json")
    change_record(path, finished=...)
    load(path)


MORE = "does not follow from the counts, which give"


@pytest.mark.parametrize(
    ("schema", "image", "cells", "message"),
    [
        (CERTIFY, 2, {"radius": "0.700000"}, "predict=2, radius=0.700000 do not follow from the counts, which prove"),
        (CERTIFY, 2, {"radius": "0.100000", "predict": -1, "correct": 0}, "predict=-1, radius=0.100000 do not follow"),
        (CERTIFY, 6, {"predict": 0, "correct": 1}, "which prove no certificate"),
        (CERTIFY, 2, {"predict": 1, "correct": 0}, "predict=1, radius="),
        (CERTIFY, 2, {"count": 1001, "count_label": 1001}, "its counts cannot be with n0=20 and n=1000"),
        (CERTIFY, 2, {"count0": 0}, "its counts cannot be"),
        (CERTIFY, 2, {"count_label": 901}, "count_label 901 contradicts its other counts"),
        (CERTIFY, 8, {"count_label": 61}, "count_label 61 contradicts its other counts"),
        (CERTIFY, 8, {"label": 2, "correct": 1}, "count_label 40 contradicts its other counts"),
        (CERTIFY, 10, {"count_label": 299}, "count_label 299 contradicts"),  # 700 + 300 are all votes already
        (CERTIFY, 2, {"votes": 900}, "its counts cannot be"),
        (CERTIFY, 2, {"radius": "-0.100000"}, "is not what this program wrote"),
        (CERTIFY, 2, {"radius": "nan"}, "is not what this program wrote"),
        (CERTIFY, 2, {"votes": "1000\r"}, "is not what this program wrote"),
        (CERTIFY, 2, {"idx": 12}, "image 12 is none of those asked for"),
        (CERTIFY, 2, {"idx": 3}, "image 3 is none of those asked for"),
        (CERTIFY, 2, {"idx": 4}, "image 4 for the second time"),
        (DECIDE, 2, {"radius": "0.300001"}, "radius=0.300001, decision=certified do not follow"),
        (DECIDE, 2, {"predict": 1, "correct": 0}, "predict=1, radius=0.300000, decision=certified do not follow"),
        (DECIDE, 2, {"decision": "undecided"}, "decision=undecided do not follow"),
        (DECIDE, 4, {"decision": "certified"}, f"decision=certified {MORE} decision=not_certified"),
        (DECIDE, 4, {"decision": "certified", "predict": 1, "correct": 1, "radius": "0.300000"}, "prove no class"),
        (DECIDE, 2, {"decision": "not_certified", "predict": -1, "correct": 0, "radius": "0.000000"}, MORE),
        (DECIDE, 2, {"votes": 950}, "its counts cannot be"),
        (DECIDE, 0, {"votes": 100, "count": 101}, "its counts cannot be"),
        (PREDICT, 4, {"predict": 1, "correct": 1}, "predict=1, radius=0.000000 do not follow"),
        (PREDICT, 2, {"radius": "0.000001"}, "radius=0.000001 do not follow"),
        (PREDICT, 6, {"p_value": "1e-05"}, f"p_value=1e-05 {MORE} p_value="),
        (PREDICT, 6, {"predict": 0, "correct": 1, "p_value": "1e-05"}, "predict=0, radius=0.000000 do not follow"),
        (PREDICT, 2, {"count_runner_up": 101}, "its counts cannot be"),
        (PREDICT, 6, {"count_label": 399}, "count_label 399 contradicts"),
        (ATTACK, 4, {"adversarial": 1, "distance": "0.250000"}, f"adversarial=1, distance=0.250000 {MORE}"),
        (ATTACK, 4, {"distance": "0.250000"}, f"distance=0.250000 {MORE} distance=Infinity"),
        (ATTACK, 2, {"adversarial": -1}, f"distance=0.250000 {MORE}"),
        (ATTACK, 2, {"adversarial": 5}, "adversarial 5 is no other class than predict 5"),
        (ATTACK, 2, {"radius": "0.100000"}, "radius=0.100000 do not follow"),
        (ATTACK, 4, {"p_value": "1e-09"}, f"p_value=1e-09 {MORE}"),
    ],
)
def test_a_line_that_its_counts_contradict(tmp_path, schema, image, cells, message):
    path = honest(tmp_path / "c.tsv", schema)
    forge(path, image, **cells)
    keep_digest(path)
    refused(path, message)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_finished_file_is_what_it_was(tmp_path, schema):
    path = honest(tmp_path / "c.tsv", schema)
    good = path.read_text()
    lines = good.splitlines(keepends=True)
    changes = {
        "a line taken out": "".join([*lines[:3], *lines[4:]]),
        "the last line taken out": "".join(lines[:-1]),
        "another order": "".join([lines[0], *lines[:0:-1]]),
        "another time": good.replace("0:00:00.1", "0:00:00.2"),
    }
    for name, content in changes.items():
        path.write_text(content)
        refused(path, "was changed after it was finished: its SHA-256 is not the one in c.json")
        if "taken out" in name:
            keep_digest(path, images=6)
            refused(path, "it holds 5 images, and c.json says 6")
            keep_digest(path)
            refused(path, "c.json is damaged: finished names 5 images, and skip, split_size, shard and max 6")
            change_record(path, finished=...)  # then it is an unfinished file
            load(path)
            assert standing(path)[1].startswith(f"{path} is not finished: 5 of 6 images")
        path.write_text(good)
        keep_digest(path)


NARROW = ["mode", "skip", "split_size", "shard", *VOTES, *OF_MODE[CERTIFY]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma": 1.0}, None),  # radii at a greater sigma: the lines claim less
        ({"sigma": 0.25}, "do not follow from the counts"),
        ({"alpha": 1e-6}, "do not follow from the counts"),
        ({"n": 999}, "its counts cannot be with n0=20 and n=999"),
        ({"n": 10**6}, "its counts cannot be with n0=20 and n=1000000"),
        ({"n0": 19}, "its counts cannot be"),
        ({"mode": "predict"}, "has the columns of mode='certify', and c.json is the record of mode='predict'"),
        ({"mode": ["certify"]}, "is no record of a certification"),
        ({"max": 5}, "finished names 6 images, and skip, split_size, shard and max 5"),
        ({"max": 5, "finished": ...}, "image 10 is none of those asked for"),
        ({"split_size": 10, "finished": ...}, "image 10 is none of those asked for"),
        ({"split_size": 100}, None),  # more images than it is to hold, by max; --verify knows the split
        ({"split_size": 2**31 + 1}, "split_size=2147483649: use a whole number of at least 1 and at most 2147483648"),
        ({"skip": 3, "finished": ...}, "image 2 is none of those asked for"),
        ({"shard": "1/2"}, "finished names 6 images"),
        ({"shard": "7/7"}, "shard=7/7: there are only 6 images"),
        ({"shard": "1/999999999", "finished": ...}, "image 2 is none of those asked for"),
        ({"identity": NARROW}, "it lacks parameter_digest, dataset, split, data_digest, model, dtype"),
        ({"parameter_digest": ...}, "it lacks parameter_digest"),
        ({"tolerance": 0.1, "tolerance_rule": 1}, "it lacks tolerance_rule"),
        ({"finished": {"images": True, "sha256": ""}}, "finished names True images"),
        ({"finished": {"images": 6, "sha256": "0" * 64}}, "its SHA-256 is not the one in c.json"),
        ({"device": ["x"]}, "device=['x'] is no text"),
        ({"command": 1}, "command=1 is no text"),
        ({"data_digest": []}, "data_digest=[] is no text"),
        ({"identity": ["\x1b[2J\n"]}, "identity=['\\x1b[2J\\n'] is no list of texts"),
        ({"config": [1]}, "config=[1] is no JSON object"),
        ({"continued_with": [{"git_commit": 1}]}, "git_commit=1 is no text"),
        ({"shards": [{"shard": "1/2"}]}, "shards: number 1 of 1 is shard '1/2'"),
        ({"shards": [{"shard": "1/1", "sigma": 0.5}]}, "with sigma=0.5"),
        ({"shards": [{}] * 5_000}, "shards: number 1 of 5000 is shard None"),
    ],
)
def test_a_record_that_contradicts_the_file_or_itself(tmp_path, changed, message):
    path = honest(tmp_path / "c.tsv")
    most = json.loads(path.with_suffix(".json").read_text())["max"]
    change_record(path, **{"max": most, **changed})
    if message is None:
        load(path)
    else:
        refused(path, message)


def test_counts_and_record_are_not_shaken_off(tmp_path):
    path = honest(tmp_path / "c.tsv")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    text = path.with_suffix(".txt")  # another name is no other file
    text.write_text(path.read_text().replace("\t0.", "\t9.", 1))
    with pytest.raises(UserError, match="do not follow from the counts"):
        load(text)
    path.write_text("".join("\t".join(line[:6]) + "\n" for line in lines))
    refused(path, "lacks the counts that its record c.json is about")
    record = path.with_suffix(".json")
    good = record.read_text()
    for removed in (["parameter_digest"], ["identity", "parameter_digest"], ["mode", "parameter_digest"]):
        change_record(path, **dict.fromkeys(removed, ...))
        refused(path, "lacks the counts that its record c.json is about")
        record.write_text(good)
    for content in (good + "x", good[:-3], "[]"):  # it may be any program's file, and is named
        record.write_text(content)
        load(path)
        assert f"{path} is read without the file beside it: {record} " in standing(path)[1]
    record.write_text(good)
    older = "".join("\t".join(line[:-2]) + "\n" for line in lines)  # an older header, without two columns
    path.write_text(older)
    refused(path, "was changed after it was finished")
    path.write_text("\ufeff" + "".join("\t".join(line) + "\n" for line in lines))
    refused(path, "not those of this program")
    path.write_text("".join("\t".join(line) + "\r\n" for line in lines))
    refused(path, "not those of this program")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("reader", [read_table, load])
def test_a_file_that_is_finished_while_it_is_read_is_not_called_changed(tmp_path, monkeypatch, reader, first):
    path, states = tmp_path / "c.tsv", iter(range(99))
    whole = honest(tmp_path / "whole.tsv").read_text()
    finished = path.with_name("whole.json").read_text().replace("whole.", "c.")
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    path.with_suffix(".json").write_text(finished)
    change_record(path, finished=...)
    read_bytes = read._read_bytes

    def finish_after(path, *most):
        content = read_bytes(path, *most)
        if next(states) == first:
            path.write_text(whole)
            path.with_suffix(".json").write_text(finished)
        return content

    monkeypatch.setattr(read, "_read_bytes", finish_after)
    reader(path)
    assert not read_table(path).changed


def test_shards_that_contradict_the_merged_lines(tmp_path):
    paths = [honest(tmp_path / f"{i}.tsv", selection=SIX._replace(shard=Shard(i, 2))) for i in (1, 2)]
    output = tmp_path / "all.tsv"
    merge(paths, output)
    good, record = output.read_text(), json.loads(output.with_suffix(".json").read_text())
    load(output)
    forge(output, 2, time="0:00:00.200000")  # no count contradicts it, and the digest is the new one
    keep_digest(output)
    refused(output, "its lines of shard 2/2 do not have the SHA-256 in all.json")
    output.write_text(good)
    for part, message in (
        ({"shard": "1/2"}, "shards: number 2 of 2 is shard '1/2'"),
        ({"parameter_digest": "q"}, "with parameter_digest='q'"),
        ({"finished": 3}, "finished=3 lacks images and sha256"),
    ):
        shards = [record["shards"][0], {**record["shards"][1], **part}]
        output.with_suffix(".json").write_text(json.dumps({**record, "shards": shards}))
        refused(output, message)
    output.with_suffix(".json").write_text(json.dumps(record))
    honest(output)  # and goes on as the file of a single call
    assert standing(output) == (True, "")
    # A forged line in a shard that nobody calls finished is not merged.
    forge(paths[0], 4, radius="1.000000", predict=1, correct=1)
    change_record(paths[0], finished=...)
    with pytest.raises(UserError, match=r"1\.tsv, image 4: predict=1, radius=1.000000 do not follow"):
        merge(paths, tmp_path / "other.tsv")
    assert not (tmp_path / "other.tsv").exists()


CELL = Cell("mnist", "gaussian", 0.5, 0, None, {}, SIX, 1000)


def result(folder, **made):
    """A kept cell, whose images are those of an honest file."""
    cell = folder / "mnist" / "gaussian_sigma0.50_seed0"
    cell.mkdir(parents=True)
    path = honest(cell / "certificates.tsv", about={"config": json.loads(CELL.config().to_json())})
    about = {"method": "gaussian", "sigma": 0.5, "seed": 0, "lbd": None, "epochs": 90, "n": 1000, "table": "mnist"}
    # The record's n0 = 20 is no choice of a plan; a name of it is enough for the reader.
    about |= {"deviations": [*deviations(CELL), "n0 20"], "images": 6}
    (cell / "run.json").write_text(json.dumps({name: value for name, value in (about | made).items() if value != ...}))
    pack(path)
    return path


def pack(path):
    path.with_suffix(".tsv.gz").write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, None),
        ({"sigma": 1.0}, "sigma: 1.0 -> 0.5"),
        ({"seed": 1}, "seed: 1 -> 0"),
        ({"n": 100_000}, "n: 100000 -> 1000"),
        ({"n": ...}, "n: None -> 1000"),
        ({"images": 500}, "images: 500 -> 6"),
        ({"images": ...}, "images: None -> 6"),
        ({"table": "cifar10"}, "table: cifar10 -> mnist"),
        ({"deviations": ["6 of 12 images", "n 1,000"]}, "does not name all deviations from the published cell (n0 20)"),
        ({"deviations": ["n 1,000", "n0 20"]}, "(6 of 12 images)"),
        ({"deviations": ["6 of 12 images", "n0 20"]}, "(n 1,000)"),
        ({"method": "consistency"}, "method: consistency -> gaussian"),
        ({"epochs": 1}, "epochs: 1 -> 90"),
        ({"lbd": 5.0}, "lbd: 5.0 -> 0.0"),
        ({"method": ["gaussian"]}, "is damaged (method=['gaussian'] is no text)"),
        ({"deviations": [1]}, "is damaged (deviations=1 is no text)"),
        ({"calls": 5}, "is damaged"),
        ({"calls": [{"program": 1}]}, "is damaged (program=1 is no text)"),
        ({"calls": [{}]}, "lacks 'program'"),
        ({"certified_with": {"git_commit": 5}}, "is damaged (git_commit=5 is no text)"),
        ({"continued_with": [5]}, "is damaged"),
        ({"lbd": "x"}, "is damaged (lbd='x': use a number"),
        ({"seed": 1.5}, "is damaged (seed=1.5: use a whole number"),
    ],
)
def test_a_kept_cell_must_be_of_its_settings(tmp_path, made, message):
    result(tmp_path, **made)
    if message is None:
        assert len(read_results(tmp_path / "mnist")) == 1
        return
    with pytest.raises(UserError) as error:
        read_results(tmp_path / "mnist")
    assert message in str(error.value) and "run reproduce.py again for this cell" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        ({"alpha": 0.9}, {}, "the published cell (alpha 0.9)"),
        ({"bound": "two_class", "alpha_share": 0.5}, {}, "(bound two_class)"),
        ({"dataset": "fashion_mnist"}, {}, "(dataset fashion_mnist)"),
        ({"model": "resnet20"}, {}, "(model resnet20)"),
        ({"dtype": "bfloat16"}, {}, "(dtype bfloat16)"),
        ({"split": "train"}, {}, "(split train)"),
        ({"sampler": "grid", "grid_steps": 255, "image_shape": [28, 28, 1]}, {}, "(sampler grid)"),
        ({"precision": "highest"}, {}, "(precision highest)"),
        ({"config": ...}, {}, "lacks config.method"),
        ({}, {"optimizer": {"lr": 0.5}}, "(optimizer.lr 0.5)"),
        ({}, {"num_noise": 2}, "(num_noise 2)"),
        ({}, {"model": "resnet20"}, "(model lenet; model resnet20)"),
    ],
)
def test_a_kept_cell_must_name_what_was_not_published(tmp_path, changed, config, message):
    path = result(tmp_path)
    record = json.loads(path.with_suffix(".json").read_text())
    names = dict.fromkeys([*record["identity"], *(name for name in changed if name != "config")])
    change_record(path, **{"identity": [*names], "config": record["config"] | config, **changed})
    for image in range(0, 12, 2):  # lines that claim nothing follow from any settings
        forge(path, image, predict=-1, radius="0.000000", correct=0)
    keep_digest(path)
    pack(path)
    with pytest.raises(UserError) as error:
        read_results(tmp_path / "mnist")
    assert message in str(error.value)


def test_a_forged_cell_is_no_result(tmp_path):
    path = result(tmp_path)
    forged = {
        "which prove class 2, radius": lambda: forge(path, 2, radius="0.900000"),
        "was changed after it was finished": lambda: forge(path, 2, time="0:00:00.200000"),
        "is not finished": lambda: change_record(path, finished=...),
        "has no counts that prove its radii, or no record": lambda: path.with_suffix(".json").unlink(),
    }
    good, record = path.read_text(), path.with_suffix(".json").read_text()
    for message, do in forged.items():
        do()
        pack(path)
        with pytest.raises(UserError, match=message):
            read_results(tmp_path / "mnist")
        path.write_text(good)
        path.with_suffix(".json").write_text(record)


def test_numbers_of_a_record_cost_no_memory_and_no_time(tmp_path):
    path = honest(tmp_path / "c.tsv")
    change_record(path, split_size=2**31, max=2**31, finished=...)
    started = time.process_time()
    tracemalloc.start()
    load(path)
    table = read_table(path)
    assert table.missing == 2**30 - 6 and "6 of 1073741824 images" in standing(path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 and time.process_time() - started < 2
    names = json.loads(path.with_suffix(".json").read_text())["identity"]
    change_record(path, tolerance=1e-9, tolerance_rule=1, n=10**9, identity=[*names, "tolerance_rule"])
    refused(path, "n=1000000000: this version checks a tolerance up to 1,000,000 votes only")
    with pytest.raises(UserError, match="this version checks a tolerance up to"):
        contradictions(read_table(path))
    shard = honest(tmp_path / "s.tsv", selection=SIX._replace(shard=Shard(1, 6)))
    change_record(shard, shard="1/999999999", split_size=2**31, max=2**31, finished=...)
    with pytest.raises(UserError, match=r"shard 2/999999999, .* and 999999990 more is missing"):
        merge([shard], tmp_path / "all.tsv")


COLUMNS_OF_FIELD = b"idx\tlabel\tpredict\tradius\tcorrect\ttime"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (COLUMNS_OF_FIELD, "has no images yet"),
        (COLUMNS_OF_FIELD + b"\n0\t1\t1\t0.5\t1\t1\n", None),
        (COLUMNS_OF_FIELD + b"\n1", "line 2: 1 columns instead of 6"),
        (SCHEMAS["certify"].header.encode() + b"\n0", "line 2, is not what this program wrote"),
    ],
)
def test_empty_lines_cost_no_more_than_their_bytes(tmp_path, content, message):
    path, size = tmp_path / "c.tsv.gz", 2**18
    path.write_bytes(gzip.compress(content + b"\n" * size, compresslevel=1))
    tracemalloc.start()
    if message is None:
        assert load(path)[0].idx.tolist() == [0]
    else:
        with pytest.raises(UserError, match=message):
            load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size + 2**20


def test_a_file_without_an_end_is_refused():
    with pytest.raises(UserError, match="/dev/zero has more than 134,217,728 bytes, too many for certificates"):
        load(Path("/dev/zero"))


def test_all_votes_of_the_largest_number_are_summarized(program, tmp_path):
    path = tmp_path / "c.tsv"
    settings = VOTES | OF_MODE[CERTIFY] | {"n": 10**9}
    selection = Selection(1)
    file = CertificateFile(path, schema=CERTIFY, identity={**settings, **BINDING}, about={}, selection=selection)
    counts = {"count0": 20, "count": 10**9, "count_runner_up": 0, "selected": 1, "count_label": 10**9, "votes": 10**9}
    about = {"idx": 0, "label": 1, "predict": 1, "radius": Decimal("2"), "correct": 1, "time": 1}
    file.append([about | counts])
    file.finish()
    file.close()
    (summary,) = json.loads(program.succeeds("cli.analyze", path, "--exact", "--format=json").out)
    assert summary["acr"] == 2 and summary["n"] == 10**9
