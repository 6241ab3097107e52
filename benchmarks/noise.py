"""Time of noise on the grid of 8-bit images and of float32 noise: the noise alone, and whole votes.

    python benchmarks/noise.py --json noise.json

The samplers take turns, every second round in the opposite order. The first table has the noise alone: each sampler
returns noisy images in float32. It gives the median over the rounds of the time relative to `float, shaped`, which
draws each image's noise in its shape. `float, flat` are the same bits as the library draws them. `grid` are whole
numbers, `one-hot` the same ones without a gather, for TPUs.

The second table has votes as certify.py counts them, with each sampler: medians of the wall time, and on a CPU of the
processor time, of `grid` relative to `float`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import device_name, make_network

from rs_consistency import noise
from rs_consistency.common.files import write_json
from rs_consistency.devices import parallel
from rs_consistency.devices.host import keep_memory, use_cores
from rs_consistency.models.inference import for_inference
from rs_consistency.smoothing.votes import count_votes, vote_settings
from rs_consistency.statistics.rounded_gaussian import grid_table

_CASES = {"28x28x1": (128, (28, 28, 1)), "32x32x3": (64, (32, 32, 3))}  # batches of a certification on a CPU
_VOTES = {"lenet": 8192, "resnet20": 512}  # in a round
_SIGMA = 0.5
_MANY = 10**6  # images: more than a benchmark uses


def _samplers(batch: int, shape: tuple[int, ...]) -> dict[str, Callable[[], jax.Array]]:
    """Return calls that give noisy images `[N, H, W, C]` float32, compiled."""
    table = grid_table(_SIGMA)
    images = np.random.default_rng(0).integers(256, size=(batch, *shape)).astype(np.uint8)
    votes = np.arange(batch, dtype=np.int32)
    key, addresses = noise.stream_key(0, noise.Stream.CERTIFY), (np.full_like(votes, 3), np.ones_like(votes), votes)

    @jax.jit
    def shaped(images: jax.Array, sigma: jax.Array, key: jax.Array, *addresses: jax.Array) -> jax.Array:
        def draw(*address: jax.Array) -> jax.Array:
            return jax.random.normal(noise.fold(key, *address), shape, jnp.float32)

        return images + sigma * jax.vmap(draw)(*addresses)

    @jax.jit
    def flat(images: jax.Array, sigma: jax.Array, key: jax.Array, *addresses: jax.Array) -> jax.Array:
        return images + sigma * noise.addressed_noise(key, *addresses, shape=shape)

    def grid(lookup: noise.Lookup) -> Callable[..., jax.Array]:
        @jax.jit
        def sample(
            images: jax.Array, packed: jax.Array, low: jax.Array, key: jax.Array, *addresses: jax.Array
        ) -> jax.Array:
            draws = noise.grid_noise(key, *addresses, shape=shape, packed=packed, low=low, lookup=lookup)
            return (images.astype(jnp.int32) + draws).astype(jnp.float32) / np.float32(255)

        return sample

    gather, one_hot = grid("gather"), grid("one_hot")
    rest = jax.device_put((key, *addresses))
    floats = jax.device_put((images / np.float32(255), np.float32(_SIGMA)))
    wholes = jax.device_put((images, table.packed, table.low))
    return {
        "float, shaped": lambda: shaped(*floats, *rest),
        "float, flat": lambda: flat(*floats, *rest),
        "grid": lambda: gather(*wholes, *rest),
        "grid, one-hot": lambda: one_hot(*wholes, *rest),
    }


def _seconds(call: Callable[[], jax.Array], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        noisy = call()
    noisy.block_until_ready()
    return (time.perf_counter() - start) / calls


def _measure(batch: int, shape: tuple[int, ...], rounds: int, calls: int) -> dict[str, Any]:
    """Return the median time of a noisy pixel value of each sampler, and the medians of the rounds' ratios."""
    samplers = _samplers(batch, shape)
    results = {name: np.asarray(call()) for name, call in samplers.items()}  # compiles
    for first, second in (("float, shaped", "float, flat"), ("grid", "grid, one-hot")):
        if not np.array_equal(results[first], results[second]):
            sys.exit(f"{first} and {second} differ: no comparison of times")
    times = {name: [] for name in samplers}
    for turn in range(rounds):
        for name in reversed(samplers) if turn % 2 else samplers:
            times[name].append(_seconds(samplers[name], calls))
    base, size = times["float, shaped"], results["grid"].size
    return {
        name: {
            "ns_per_value": round(statistics.median(own) / size * 1e9, 2),
            "ratio": round(statistics.median(one / other for one, other in zip(own, base, strict=True)), 3),
            "ratio_of_best": round(min(own) / min(base), 3),
        }
        for name, own in times.items()
    }


def _votes(name: str, rounds: int) -> dict[str, Any]:
    """Return the ratios of the times of a network's votes, with noise on the grid to those with float32 noise."""
    model, variables, shape = make_network(name)
    apply_fn, variables = for_inference(model, variables, image_shape=shape)
    images = np.broadcast_to(np.random.default_rng(2).integers(256, size=shape).astype(np.uint8), (_MANY, *shape))
    devices, counts = parallel.choose_devices(), {}
    for sampler in ("grid", "float"):
        settings = vote_settings(
            sigma=_SIGMA,
            num_classes=10,
            n=_VOTES[name],
            seed=0,
            sampler=sampler,
            image_shape=shape,
            devices=devices,
        )
        counts[sampler] = count_votes(apply_fn, variables, images, np.arange(_MANY), settings=settings, devices=devices)
        next(counts[sampler])  # compiles
    pairs = []
    for turn in range(rounds):
        spent = {}
        for sampler in reversed(counts) if turn % 2 else counts:
            start = time.perf_counter(), time.process_time()
            size = len(next(counts[sampler]).counts)
            spent[sampler] = (time.perf_counter() - start[0]) / size, (time.process_time() - start[1]) / size
        pairs.append([one / other for one, other in zip(spent["grid"], spent["float"], strict=True)])
    wall, processor = (statistics.median(ratios) for ratios in zip(*pairs, strict=True))
    return {"wall": round(wall, 3), "processor": round(processor, 3), "rounds": rounds}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each case (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=1, help="calls of a sampler in a round (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images in a batch (default: 128 of MNIST, 64 of CIFAR-10)")
    parser.add_argument("--vote_rounds", type=int, default=30, help="rounds of votes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    use_cores()
    keep_memory()  # as certify.py does
    results = {}
    for case, (batch, shape) in _CASES.items():
        batch = arguments.batch or batch
        results[case] = {"batch": batch, **_measure(batch, shape, arguments.rounds, arguments.calls)}
    names = [name for name in next(iter(results.values())) if name != "batch"]
    print(f"Time relative to `float, shaped`, in brackets of the fastest rounds; {device_name()}.\n")
    print("| batch | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for case, result in results.items():
        cells = [f"{result[name]['ratio']:.2f} ({result[name]['ratio_of_best']:.2f})" for name in names]
        cells[0] = f"1 ({result[names[0]]['ns_per_value']:.1f} ns a value)"
        print(f"| {result['batch']} of {case} | " + " | ".join(cells) + " |")
    print("\nVotes, `grid` relative to `float`.\n\n| network | wall time | processor time |\n|---|---|---|")
    for name in _VOTES if arguments.vote_rounds else ():
        votes = results[name] = _votes(name, arguments.vote_rounds)
        print(f"| {name} | {votes['wall']:.3f} | {votes['processor']:.3f} |", flush=True)
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
