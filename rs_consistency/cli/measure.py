"""Measures how fast a configuration trains and certifies here: a program for `child`, with the arguments of train.py.

Prints JSON: `epoch_seconds`, of an epoch with its evaluation, and `votes_per_second`. A process of its own, so that a
plan does not hold the accelerator that its runs want.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rs_consistency.cli import train
from rs_consistency.cli.common import run_main


def _main(argv: Sequence[str] | None) -> None:
    values = train.parse(argv or [])
    from rs_consistency.training.dry_run import plan

    train.set_up(values.config)  # without, steps and votes take 1.4 times as long on a CPU
    found = plan(values.config, Path(values.workdir))
    print(json.dumps({"epoch_seconds": found.epoch_seconds, "votes_per_second": found.votes_per_second}))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, sys.argv[1:] if argv is None else argv)
