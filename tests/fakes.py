"""Stand-ins for train.py, certify.py and the measurement in tests of a plan: files of a run, without a network.

Files in the plan's folder change what they do: `crash_NAME` ends the cell's training by a signal, once, or with the
status in the file; `hang_NAME` makes its certification wait after the first image, `hang_measure` a measurement; with
`damaged_NAME` the last checkpoint cannot be read until it is trained again, nor then when there is a text in that file.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.cli.train import parse
from rs_consistency.common.errors import EXIT_NOT_FINISHED
from rs_consistency.common.files import read_json, write_json

STEPS = 5  # of an epoch


def main(arguments):
    named = dict(word.lstrip("-").partition("=")[::2] for word in arguments)
    workdir = Path(named["workdir"])
    if workdir.name == ".measured":
        measure(workdir.parent)
    elif "config" in named:
        train(parse(arguments).config, workdir)
    else:
        certify(workdir, named)


def measure(folder):
    if (folder / "hang_measure").exists():
        time.sleep(600)
    print(json.dumps({"epoch_seconds": 10.0, "votes_per_second": 1e5}))


def train(config, workdir):
    crash = workdir.parent / f"crash_{workdir.name}"
    if crash.exists():
        status = crash.read_text()
        crash.unlink()
        if status:
            raise SystemExit(int(status))
        os.kill(os.getpid(), signal.SIGKILL)
    damaged = workdir.parent / f"damaged_{workdir.name}"
    if damaged.exists() and not damaged.read_text():
        damaged.unlink()
    write_trained(config, workdir)


def write_trained(config, workdir):
    """The files of a finished training."""
    step = config.num_epochs * STEPS
    (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", json.loads(config.to_json()))
    line = {"epoch": config.num_epochs, "step": step, "noisy_images_per_second": 1000.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def certify(workdir, named):
    """An image a time, as the program does it; the radius is the sigma, less than the votes prove."""
    if (workdir.parent / f"damaged_{workdir.name}").exists() and "finished" in named:
        sys.exit(EXIT_NOT_FINISHED)
    config, hang = read_json(workdir / "config.json"), workdir.parent / f"hang_{workdir.name}"
    selection = Selection(10_000, int(named["skip"]), int(named["max"]))
    identity = {
        "sigma": config["sigma"],
        "n0": 100,
        "n": int(named["n"]),
        "alpha": 0.001,
        "seed": int(named["seed"]),
        "bound": "clopper_pearson",
        "dtype": config["dtype"],
        "checkpoint_step": config["num_epochs"] * STEPS,
        "parameter_digest": "",
        "split": "test",
        "dataset": config["dataset"]["name"],
        "model": config["model"],
    }
    about = {"device": "1 x fake (fake)", "config": config}
    file = CertificateFile(
        workdir / "certificates.tsv", schema=CERTIFY, identity=identity, about=about, selection=selection
    )
    votes = int(named["n"])
    for number, index in enumerate(file.remaining):
        if number == 1 and hang.exists():
            time.sleep(600)
        file.append([[int(index), 3, 3, config["sigma"], 1, 1.0, 100, votes, 0, 3, votes, votes]])
    file.finish()
    file.close()
