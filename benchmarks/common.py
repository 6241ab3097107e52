"""Shared by the benchmarks: twin networks, measurements in turns, the table and the JSON file."""

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import data, models
from rs_consistency.common.files import write_json

if TYPE_CHECKING:
    import torch  # imported where it is needed: not all benchmarks have a rival

DATASETS = {"lenet": "mnist", "resnet20": "cifar10", "resnet110": "cifar10"}


def make_twin(name: str, variables: Any) -> "torch.nn.Module":
    """Return the network in PyTorch, with the variables of the flax model unless they are None."""
    import torch_models

    info = data.dataset_info(DATASETS[name])
    twin = torch_models.LeNet() if name == "lenet" else torch_models.CifarResNet(int(name[6:]), info.mean, info.std)
    if variables is not None:
        twin.load(variables)
    return twin


def make_network(name: str, dtype: str = "float32") -> tuple[Any, Any, tuple[int, ...]]:
    """Return a flax model, random variables (batch statistics, too), and the image shape."""
    info = data.dataset_info(DATASETS[name])
    model = models.create_model(
        name, num_classes=info.num_classes, mean=info.mean, std=info.std, dtype=jnp.dtype(dtype)
    )
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *info.image_shape)))
    rng = np.random.default_rng(0)
    if "batch_stats" in variables:
        draw = {"mean": lambda shape: rng.normal(0, 0.1, shape), "var": lambda shape: rng.uniform(0.5, 2, shape)}
        variables = {
            **variables,
            "batch_stats": jax.tree.map_with_path(
                lambda path, leaf: np.float32(draw[path[-1].key](leaf.shape)), variables["batch_stats"]
            ),
        }
    return model, variables, info.image_shape


def to_torch(images: np.ndarray) -> "torch.Tensor":
    """Return images `[..., H, W, C]` as a tensor `[..., C, H, W]`."""
    import torch

    return torch.from_numpy(np.moveaxis(images, -1, -3).copy())


def torch_device() -> str:
    """Return the rival's device: the GPU if ours runs there."""
    import torch

    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def device_name() -> str:
    """Return the name of the device for the table."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'a CPU'}"


def in_turns(a: Callable[[], float], b: Callable[[], float], rounds: int) -> dict[str, Any]:
    """Return the medians of both speeds and of the rounds' ratios. Every second round begins with b."""
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            second, first = b(), a()
        else:
            first, second = a(), b()
        pairs.append((first, second))
        print(f"    {first:10.0f} {second:10.0f}  {first / second:.2f}", file=sys.stderr, flush=True)
    ratios = sorted(first / second for first, second in pairs)
    return {
        "ours": round(statistics.median(first for first, _ in pairs)),
        "rival": round(statistics.median(second for _, second in pairs)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def show(results: Sequence[dict[str, Any]], caption: str, path: Path | None) -> None:
    """Print the table and write the JSON list."""
    width = max(len(result["case"]) for result in results)
    print(f"{'case'.ljust(width)}  {'ours':>9}  {'rival':>9}  ratio   ({caption}; {device_name()})")
    for result in results:
        print(f"{result['case'].ljust(width)}  {result['ours']:>9}  {result['rival']:>9}  {result['ratio']:.2f}")
    if path:
        write_json(path, results)
