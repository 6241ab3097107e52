"""Votes per second, against the published code's eager PyTorch loop.

    python benchmarks/certification.py --json benchmarks.json --cases lenet,resnet20

Both count the same number of votes of the same network, with the same weights and, as a check shows, the same logits.
They take turns in one process, so that the machine's other work affects both. Numbers are medians over the rounds; a
ratio is the median of the rounds' ratios. The rival repeats an image, adds `randn_like`, classifies under `no_grad`,
takes the argmax and counts, at its best batch size in a first trial. Needs PyTorch: pip install -e '.[benchmarks]'.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from common import DATASETS, device_name, in_turns, make_network, make_twin, show, to_torch, torch_device

from rs_consistency.devices import parallel
from rs_consistency.devices.host import keep_memory, use_cores
from rs_consistency.models.inference import for_inference
from rs_consistency.smoothing.voter import to_float
from rs_consistency.smoothing.votes import Votes, count_votes, vote_settings

SIGMA = 0.5
RIVAL_BATCHES = {"cpu": (32, 64, 128, 256, 400, 1000), "cuda": (1000, 2000, 4000, 8000)}
_VOTES_IN_ROUND = 2000
MANY = 10**6  # images: more than any benchmark uses


def _check_twins(
    apply_fn: Any, variables: Any, twin: torch.nn.Module, shape: tuple[int, ...], tolerance: float
) -> None:
    images = np.random.default_rng(1).normal(0.5, SIGMA, (64, *shape)).astype(np.float32)
    with jax.default_matmul_precision("highest"):  # accelerators round the factors of a product
        mine = np.asarray(jax.jit(apply_fn)(variables, images), np.float64)
    with torch.no_grad():
        theirs = twin(to_torch(images)).numpy().astype(np.float64)
    difference = np.abs(mine - theirs).max() / theirs.std()
    if difference > tolerance:
        sys.exit(f"the two networks differ: logits by {difference:.1e} of their standard deviation")


class Rival:
    """The published loop: one image at a time, batches of noisy copies."""

    def __init__(self, model: torch.nn.Module, image: np.ndarray, num_classes: int, device: str) -> None:
        self.device, self.num_classes = device, num_classes
        self.model = model.to(device)
        self.image = to_torch(image).to(device)

    @torch.no_grad()
    def count(self, n: int, batch_size: int) -> np.ndarray:
        """Count n votes on the image."""
        counts = np.zeros(self.num_classes, np.int64)
        left = n
        while left > 0:
            size = min(batch_size, left)
            left -= size
            batch = self.image.repeat((size, 1, 1, 1))
            noise = torch.randn_like(batch) * SIGMA
            votes = self.model(batch + noise).argmax(1).cpu().numpy()
            counts += np.bincount(votes, minlength=self.num_classes)
        return counts

    def best_batch(self, seconds: float) -> int:
        """Return the batch size with the most votes a second; each is tried three times, in turns."""
        sizes = RIVAL_BATCHES[self.device]
        speeds = {size: [] for size in sizes}
        for size in sizes:
            self.count(size, size)  # warms up
        for _, size in itertools.product(range(3), sizes):
            speeds[size].append(_speed(lambda n, size=size: self.count(n, size), size, seconds))
        return max(sizes, key=lambda size: statistics.median(speeds[size]))


class Ours:
    """`count_votes`, as certify.py calls it, on an endless supply of images."""

    def __init__(self, apply_fn: Any, variables: Any, image: np.ndarray, *, n: int, batch_size: int | None) -> None:
        devices = parallel.choose_devices()
        settings = vote_settings(
            sigma=SIGMA,
            num_classes=10,
            n0=100,
            n=n,
            seed=0,
            batch_size=batch_size,
            image_shape=image.shape,
            devices=devices,
        )
        images = np.broadcast_to(image, (MANY, *image.shape))
        self._groups: Iterator[Votes] = count_votes(
            apply_fn, variables, images, np.arange(MANY), settings=settings, devices=devices
        )
        next(self._groups)  # compiles

    def count(self) -> int:
        """Count the votes of the next group of images, and return their number."""
        votes = next(self._groups)
        return int(votes.counts0.sum() + votes.counts.sum())


def _speed(count: Callable[[int], Any], step: int, seconds: float) -> float:
    """Return the votes per second of a function that counts n votes, over at least `seconds`."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count(step)
        done += step
    return done / (time.perf_counter() - start)


def speed_of_ours(ours: Ours, seconds: float) -> float:
    """Return the votes per second, over at least `seconds`."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += ours.count()
    return done / (time.perf_counter() - start)


def _against_rival(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    model, variables, shape = make_network(name, dtype)
    twin = make_twin(name, variables).eval()
    apply_fn, variables = for_inference(model, variables, image_shape=shape)
    _check_twins(apply_fn, variables, twin, shape, tolerance=1e-3 if dtype == "float32" else 0.3)
    image = np.random.default_rng(2).integers(256, size=shape).astype(np.uint8)
    rival = Rival(twin, to_float(image), 10, torch_device())
    batch = rival.best_batch(args.seconds / 3)
    # Few votes on each image keep the rounds short. `_overhead` measures whether many votes cost more.
    ours = Ours(apply_fn, variables, image, n=_VOTES_IN_ROUND, batch_size=None)
    print(f"{name} {dtype}: ours, rival at batch {batch}, ratio", file=sys.stderr)
    speeds = in_turns(
        lambda: speed_of_ours(ours, args.seconds),
        lambda: _speed(lambda n: rival.count(n, batch), batch, args.seconds),
        args.rounds,
    )
    case = name if dtype == "float32" else f"{name} {dtype}"
    return {"case": case, "device": device_name(), **speeds, "rival_batch": batch}


def _overhead(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure our n votes on one image against our 1,000 votes on each of n / 1000 images."""
    model, variables, shape = make_network(name)
    apply_fn, variables = for_inference(model, variables, image_shape=shape)
    image = np.random.default_rng(2).integers(256, size=shape).astype(np.uint8)
    n = args.n if name == "lenet" else args.n // 20  # a round would take a minute
    one = Ours(apply_fn, variables, image, n=n, batch_size=None)
    many = Ours(apply_fn, variables, image, n=1000, batch_size=None)
    print(f"{name}: n = {n} on one image, n = 1,000 on many, ratio", file=sys.stderr)
    speeds = in_turns(lambda: speed_of_ours(one, args.seconds), lambda: speed_of_ours(many, args.seconds), args.rounds)
    case = f"{name}: n={n} (ours) beside n=1000 (rival)"
    return {"case": case, "device": device_name(), **speeds}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="lenet,resnet20", help=f"of {', '.join(DATASETS)} (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results, a JSON list")
    parser.add_argument("--n", type=int, default=100_000, help="votes on an image (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a round of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="also ours in bfloat16, against the rival in float32")
    args = parser.parse_args()
    names = args.cases.split(",")
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        parser.error(f"cases={args.cases}: {unknown[0]!r} is unknown; use some of {', '.join(DATASETS)}")
    use_cores()
    keep_memory()  # as certify.py does; it helps the rival in the same process, too
    results = []
    for name in names:
        results.append(_against_rival(name, "float32", args))
        if args.bfloat16:
            results.append(_against_rival(name, "bfloat16", args))
        results.append(_overhead(name, args))
    show(results, "votes per second", args.json)


if __name__ == "__main__":
    main()
