"""Measures how fast a configuration trains and certifies here: a program for `child`, with the arguments of train.py.

Prints JSON: `epoch_seconds`, the time of an epoch with its evaluation, and `votes_per_second`. It runs in a process of
its own, so that the caller does not hold the accelerator that its runs need.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rs_consistency.cli import train
from rs_consistency.cli.common import entry_point


def _main(argv: Sequence[str]) -> None:
    values = train.parse(argv)
    from rs_consistency.training.dry_run import plan

    train.set_up(values.config)  # without, steps and votes take 1.4 times as long on a CPU
    measured = plan(values.config, Path(values.workdir))
    print(json.dumps({"epoch_seconds": measured.epoch_seconds, "votes_per_second": measured.votes_per_second}))


main = entry_point(_main)
