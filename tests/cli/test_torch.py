"""The programs around PyTorch checkpoints, where PyTorch is installed: files as published, certify.py, and back."""

import json
import shutil

import jax
import numpy as np
import pytest

from rs_consistency.common.errors import UserError
from rs_consistency.models.torch_checkpoints import export_torch, from_torch, read_torch_checkpoint
from rs_consistency.training import runs
from tests.helpers import ROOT, final_variables, needs_torch, rows

pytestmark = needs_torch


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The small run as a checkpoint of the published code: by the program."""
    from rs_consistency.cli import export_torch as program

    path = tmp_path_factory.mktemp("torch") / "checkpoint.pth.tar"
    program.main([f"--workdir={trained}", f"--output={path}"])
    return path


def theirs(path, output, *, config=("--config=configs/mnist.py:method=gaussian,sigma=0.5",)):
    config = [word.replace("configs/", f"{ROOT}/configs/") for word in config]
    return [f"--torch_checkpoint={path}", *config, f"--output={output}", "--n=40", "--batch_size=64"]


def test_a_run_is_exported_whole(exported, trained, program, tmp_path):
    read = read_torch_checkpoint(exported)
    assert (read.arch, read.epoch) == ("lenet", 2)
    back = from_torch(read.tensors, "lenet", dataset="mnist")
    jax.tree.map(np.testing.assert_array_equal, back, final_variables(trained))
    error = program.fails("cli.export_torch", f"--workdir={trained}", f"--output={tmp_path / 'no' / 'a.pth'}")
    assert "its folder does not exist" in error
    assert "required: --workdir" in program.fails("cli.export_torch", "--output=a.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("content", ["published", "state alone"])
def test_files_as_they_were_published_are_read(exported, tmp_path, kind, content):
    import torch

    whole = torch.load(exported, weights_only=True)
    weights = [torch.nn.Parameter(value.clone()) for value in whole["state_dict"].values()]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-4)
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()  # now it has momenta
    saved = {**whole, "optimizer": optimizer.state_dict()} if content == "published" else whole["state_dict"]
    torch.save(saved, tmp_path / "file", _use_new_zipfile_serialization=kind == "zip")
    assert ((tmp_path / "file").read_bytes()[:2] == b"PK") == (kind == "zip")
    read = read_torch_checkpoint(tmp_path / "file")
    assert read.arch == ("lenet" if content == "published" else "")
    assert read.tensors.keys() == whole["state_dict"].keys()
    for name, value in read.tensors.items():
        np.testing.assert_array_equal(value, whole["state_dict"][name].numpy())


def test_keys_that_are_no_names_are_refused(tmp_path):
    import torch

    torch.save({"state_dict": {3: torch.zeros(1)}}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match=r"numbers.pth holds no state dictionary"):
        read_torch_checkpoint(tmp_path / "numbers.pth")


def test_a_checkpoint_is_certified_continued_and_verified(exported, trained, program, tmp_path):
    ours, output = tmp_path / "ours.tsv", tmp_path / "theirs.tsv"
    program.succeeds("cli.certify", f"--workdir={trained}", "--n=40", "--batch_size=64", "--max=6", f"--output={ours}")
    out = program.succeeds("cli.certify", *theirs(exported, output), "--max=6", "--dry_run").out
    assert "PyTorch checkpoint; sigma 0.5" in out and "0 done before" in out and not output.exists()
    program.succeeds("cli.certify", *theirs(exported, output), "--max=4")
    program.succeeds("cli.certify", *theirs(exported, output), "--max=6")
    assert "holds 4 images already" in program.err
    assert rows(output) == rows(ours)  # the same network, so the same votes
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["config"] == {"model": "lenet", "dataset": {"name": "mnist"}, "sigma": 0.5}
    assert record["torch_input"] == "normalize" and len(record["torch_checkpoint_sha256"]) == 64

    words = ["--torch_checkpoint", exported, "--config", f"{ROOT}/configs/mnist.py", f"--output={output}"]
    assert "3 of 3 lines reproduce" in program.succeeds("cli.certify", *words, "--verify=3").out
    error = program.fails("cli.certify", *words, "--torch_input=none", "--verify=3")
    assert "torch_input: 'normalize' -> 'none'" in error
    for more in ((), ("--dry_run",)):
        error = program.fails("cli.certify", *theirs(exported, output), "--torch_input=none", *more)
        assert "made with other settings (torch_input: 'normalize' -> 'none')" in error
    other = tmp_path / "other.pth.tar"
    variables = jax.tree.map(lambda leaf: leaf + np.float32(0.01), runs.restore(trained, jax.devices()[:1]).variables)
    export_torch(variables, "lenet", other)
    assert "parameter_digest" in program.fails("cli.certify", *theirs(other, output))


def test_what_a_checkpoint_does_not_say_is_asked_for(exported, program, tmp_path):
    output = tmp_path / "a.tsv"
    plain = theirs(exported, output, config=["--config=configs/mnist.py"])
    assert "--torch_checkpoint needs another flag; add --sigma=NUMBER" in program.fails("cli.certify", *plain)
    error = program.fails("cli.certify", *plain, "--config.model=resnet20", "--sigma=1")
    assert "is a lenet, the configuration a resnet20; add --config.model=lenet" in error
    assert not output.exists()
    program.succeeds("cli.certify", *plain, "--sigma=1", "--max=1")
    assert json.loads(output.with_suffix(".json").read_text())["config"]["sigma"] == 1
    # A cell that its method would not train without more is as good as any: how the network was trained is not asked.
    catrs = theirs(exported, tmp_path / "b.tsv", config=["--config=configs/cifar10.py:method=catrs,sigma=0.25"])
    program.succeeds("cli.certify", *catrs, "--config.dataset.name=mnist", "--config.model=lenet", "--max=1")
    moved = shutil.copy(exported, tmp_path / "moved.pth.tar")  # where it lies does not matter
    program.succeeds("cli.certify", f"--torch_checkpoint={moved}", *plain[1:], "--sigma=1", "--max=2")
