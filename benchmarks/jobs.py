"""The runs of a plan on a CPU: one on each core at a time, against one after the other, each on all cores.

    python benchmarks/jobs.py --cases "lenet consistency" --json benchmarks.json

reproduce.py does the first by default, the second with `--jobs=1`. The table has the noisy images and the votes of all
runs together in a second. The processes stay between the rounds and take turns. It also has the time from a process's
start to its first finished step and group of votes, with the plan's compile cache filled and empty. Needs PyTorch, as
the other benchmarks do: pip install -e '.[benchmarks]'.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import certification
import numpy as np
import training
from common import device_name, in_turns, make_network, show

from rs_consistency.devices.host import keep_memory, use_cores
from rs_consistency.models.inference import for_inference

_UNITS = {"training": "noisy images", "certification": "votes"}


class _Run:
    """A process that trains or certifies for some seconds on request."""

    def __init__(self, case: str, cores: Sequence[int], cache: str) -> None:
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--cases={case}", f"--cores={','.join(map(str, cores))}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        )
        self._answer()
        self.start_seconds = time.perf_counter() - start

    def ask(self, task: str, seconds: float) -> None:
        """Request `seconds` of training or certification."""
        self._process.stdin.write(json.dumps([task, seconds]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> float:
        """Return the speed: noisy images or votes per second."""
        return float(self._answer())

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a run ended with status {self._process.wait()}")
        return line

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)


def _together(runs: Sequence[_Run], task: str, seconds: float) -> float:
    for run in runs:
        run.ask(task, seconds)
    return sum(run.answer() for run in runs)


def _start(case: str, cores: Sequence[int], cache: str) -> float:
    with _Run(case, cores, cache) as run:
        return run.start_seconds


def _compare(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    results = []
    with tempfile.TemporaryDirectory() as cache, ExitStack() as stack:
        all_cores = [stack.enter_context(_Run(case, cores, cache))]
        each_core = [stack.enter_context(_Run(case, [core], cache)) for core in cores]
        for task, unit in _UNITS.items():
            print(f"{case}, {task}: a run on each core, one on all, ratio", file=sys.stderr)
            speeds = [functools.partial(_together, runs, task, args.seconds) for runs in (each_core, all_cores)]
            medians = in_turns(*speeds, args.rounds)
            results.append({"case": f"{case}, {unit} a second", "device": device_name(), **medians})
    with tempfile.TemporaryDirectory() as filled:
        _start(case, cores, filled)
        print(f"{case}, start: milliseconds with a filled compile cache, with an empty one, ratio", file=sys.stderr)

        def empty() -> float:
            with tempfile.TemporaryDirectory() as cache:
                return 1000 * _start(case, cores, cache)

        speeds = [lambda: 1000 * _start(case, cores, filled), empty]
        results.append({"case": f"{case}, start in ms", "device": device_name(), **in_turns(*speeds, args.starts)})
    return results


def _serve(case: str, cores: Sequence[int]) -> None:
    """Serve requests in a run's process: from stdin, until it ends, with answers on stdout."""
    os.sched_setaffinity(0, cores)  # before JAX starts threads
    use_cores()
    keep_memory()
    config = training.make_config(training.CASES[case], "float32")
    steps = training.Ours(config, training.make_examples(config))
    steps.step()
    steps.wait()
    model, variables, shape = make_network(training.CASES[case].model)
    apply_fn, variables = for_inference(model, variables, image_shape=shape)
    image = np.random.default_rng(2).integers(256, size=shape).astype(np.uint8)
    votes = certification.Ours(apply_fn, variables, image, n=2000, batch_size=None)
    print("ready", flush=True)
    for line in sys.stdin:
        task, seconds = json.loads(line)
        trains = task == "training"
        speed = training.speed_of(steps, config, seconds) if trains else certification.speed_of_ours(votes, seconds)
        print(speed, flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default="lenet consistency", help="some of those of training.py (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the results, a JSON list")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="rounds of a start (default: %(default)s)")
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = args.cases.split(",")
    unknown = [case for case in cases if case not in training.CASES]
    if unknown:
        parser.error(f"cases={args.cases}: {unknown[0]!r} is unknown; use some of {', '.join(training.CASES)}")
    if args.cores:
        _serve(cases[0], [int(core) for core in args.cores.split(",")])
        return
    show([result for case in cases for result in _compare(case, args)], "ours: a run on each core", args.json)


if __name__ == "__main__":
    main()
