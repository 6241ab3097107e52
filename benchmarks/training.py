"""Training speed in noisy images per second, against eager PyTorch steps as the published code has them.

    python benchmarks/training.py --json benchmarks.json --cases "lenet gaussian,lenet consistency"

Both take the same step (same model and initial weights, objective, noise count, batch, optimizer; that they compute
the same loss and gradient is checked first), in turns, within one process: the machine's other work hits both. Numbers
are medians over the rounds; a ratio is the median of the rounds' ratios. Beside them, of each in a process of its own:
seconds to the first finished step (ours: compilation, nothing cached) and peak memory. Needs PyTorch: pip install -e
'.[benchmarks]'.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import device_name, in_turns, make_twin, show, to_torch, torch_device
from ml_collections import ConfigDict
from torch_methods import Trainer

from rs_consistency import data, methods
from rs_consistency.devices import parallel
from rs_consistency.devices.host import keep_memory, use_cores
from rs_consistency.training.array_inputs import ArrayInputs
from rs_consistency.training.step import compile_steps, create_state, make_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import cifar10, mnist

NUM_EXAMPLES = 10_000
_IN_FLIGHT = 8


class Case(NamedTuple):
    """A published training step."""

    model: str
    cell: str  # of configs/mnist.py or configs/cifar10.py
    batch_size: int = 256  # noisy images in a step


CASES = {
    "lenet gaussian": Case("lenet", "method=gaussian,sigma=0.5"),
    "lenet consistency": Case("lenet", "method=consistency,sigma=0.5"),
    "lenet smoothadv": Case("lenet", "method=smoothadv,sigma=0.5"),
    "lenet macer": Case("lenet", "method=macer,sigma=0.5", 256 * 16),
    "resnet20 consistency": Case("resnet20", "method=consistency,sigma=0.5"),
}


def make_config(case: Case, dtype: str) -> ConfigDict:
    """The published step, at full strength from its first epoch on and at a learning rate that changes little."""
    config = (mnist if case.model == "lenet" else cifar10).get_config(case.cell)
    config.update(
        {
            "model": case.model,
            "batch_size": case.batch_size,
            "dtype": dtype,
            "dataset": {"augment": "none"},
            "smoothadv": {"warmup_epochs": 0},
            "macer": {"deferred": False},
            "optimizer": {"lr": 1e-5},
        }
    )
    return config


def make_examples(config: ConfigDict) -> data.Split:
    """Images of noise at the dataset's size: speed does not depend on what they show."""
    info, rng = data.dataset_info(config.dataset.name), np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_EXAMPLES, *info.image_shape), np.uint8)
    return data.Split(images, rng.integers(0, info.num_classes, NUM_EXAMPLES).astype(np.int32))


class Ours:
    """The compiled step, called as the training loop calls it."""

    def __init__(self, config: ConfigDict, examples: data.Split) -> None:
        devices = parallel.choose_devices()
        inputs = ArrayInputs(config, examples, examples, devices=devices, extra={})
        self._steps = compile_steps(config, inputs)
        self.steps_per_call = self._steps.per_call
        self._state = parallel.replicate(create_state(config), devices)
        self.variables = jax.device_get(self._state.variables)
        (self._feed,) = inputs.feeds(0, 1)
        self._pending: list[Any] = []

    def step(self) -> None:
        """Sends a call of `steps_per_call` steps, and waits for the one before the last few."""
        number = np.int32(self.steps_per_call)
        self._state, metrics = self._steps.train(self._state, number, *self._feed.args, **self._feed.parts)
        self._pending = [*self._pending[-_IN_FLIGHT:], metrics]
        jax.block_until_ready(self._pending[0])

    def wait(self) -> None:
        """Until all steps are done."""
        loss = float(self._pending[-1]["loss"][-1])
        if not np.isfinite(loss):
            sys.exit("our loss is not finite")


class _Classifier:
    """`methods.Classifier` without vmap or devices: all copies as one batch."""

    def __init__(self, model: Any, params: Any, state: Any) -> None:
        self._model, self._variables = model, {"params": params, **state}

    def noisy(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        flat = (images + noise).reshape(-1, *images.shape[1:])  # [M, B, ...] -> [M*B, ...]
        logits, _ = self._model.apply(self._variables, flat, train=True, mutable=["batch_stats"])
        return logits.reshape(*noise.shape[:2], -1)

    def frozen(self, images: jax.Array) -> jax.Array:
        return self._model.apply(jax.lax.stop_gradient(self._variables), images, train=False)


def _check_twins(config: ConfigDict, variables: Any, rival: Trainer, examples: data.Split) -> None:
    """Both must have the same loss and gradient on the same examples and noise."""
    num, rng = 8, np.random.default_rng(1)
    images, labels = examples.images[:num] / np.float32(255), examples.labels[:num]
    noise = np.float32(config.sigma * rng.normal(size=(config.num_noise, *images.shape)))
    batch = methods.Batch(
        images=jnp.asarray(images),
        labels=jnp.asarray(labels),
        noise=jnp.asarray(noise),
        keys=jax.random.split(jax.random.key(0), num),
        epoch=jnp.int32(0),
        extra={},
    )
    objective = methods.make_objective(config)
    model = make_model(config).clone(axis_name=(), dtype=jnp.float32)
    state = {name: value for name, value in variables.items() if name != "params"}
    loss_fn = jax.jit(
        jax.value_and_grad(lambda params: objective(_Classifier(model, params, state), batch).loss.mean())
    )
    with jax.default_matmul_precision("highest"):  # accelerators round the factors of a product
        loss, gradient = jax.device_get(loss_fn(variables["params"]))
    norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradient)))
    inputs = (to_torch(images), torch.from_numpy(labels).long(), to_torch(noise))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        their_loss = rival.gradients(*(tensor.to(torch_device()) for tensor in inputs))
    for what, mine, theirs in (("losses", loss, their_loss), ("norms of the gradient", norm, rival.gradient_norm())):
        if abs(mine - theirs) > 1e-3 * abs(theirs):
            sys.exit(f"the two steps differ: {what} {mine:.6g} and {theirs:.6g}")


def _make_rival(case: Case, config: ConfigDict, variables: Any, examples: data.Split) -> Trainer:
    images, labels = to_torch(examples.images / np.float32(255)), torch.from_numpy(examples.labels).long()
    return Trainer(config, make_twin(case.model, variables), images, labels, torch_device())


def speed_of(trainer: Ours | Trainer, config: ConfigDict, seconds: float) -> float:
    """Noisy images per second over at least so many seconds."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        trainer.step()
        done += config.batch_size * trainer.steps_per_call
    trainer.wait()
    return done / (time.perf_counter() - start)


def _compare(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    config = make_config(case, dtype)
    examples = make_examples(config)
    ours = Ours(config, examples)
    rival = _make_rival(case, config, ours.variables, examples)
    _check_twins(config, ours.variables, rival, examples)
    for step in (ours.step, rival.step):
        for _ in range(3):
            step()
    ours.wait()
    print(f"{name} {dtype}: ours, rival, ratio", file=sys.stderr)
    found = in_turns(
        lambda: speed_of(ours, config, args.seconds), lambda: speed_of(rival, config, args.seconds), args.rounds
    )
    alone = {side: _alone(side, name, dtype) for side in ("ours", "rival")}
    return {
        "case": name if dtype == "float32" else f"{name} {dtype}",
        "device": device_name(),
        **found,
        **{f"{what}_{side}": alone[side][what] for what in ("first_step_seconds", "peak_mib") for side in alone},
    }


def _alone(side: str, name: str, dtype: str) -> dict[str, float]:
    """Seconds to the first finished step, and peak memory, in a process of its own."""
    command = [sys.executable, __file__, f"--alone={side}", f"--cases={name}", f"--dtype={dtype}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_alone(side: str, name: str, dtype: str) -> dict[str, float]:
    case = CASES[name]
    config = make_config(case, dtype)
    examples = make_examples(config)
    jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    if side == "ours":
        trainer = Ours(config, examples)
    else:  # its weights do not matter here, and are not ours: nothing is compiled
        images, labels = to_torch(examples.images / np.float32(255)), torch.from_numpy(examples.labels).long()
        trainer = Trainer(config, make_twin(case.model, None), images, labels, torch_device())
    trainer.step()
    trainer.wait()
    seconds = time.perf_counter() - start
    for _ in range(5):
        trainer.step()
    trainer.wait()
    return {"first_step_seconds": round(seconds, 2), "peak_mib": round(_peak_bytes(side) / 2**20)}


def _peak_bytes(side: str) -> int:
    """Return the peak memory of the accelerator, or of this process."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        # Not getrusage, whose maximum a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return device.memory_stats()["peak_bytes_in_use"] if side == "ours" else torch.cuda.max_memory_allocated()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="some of these (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results, a JSON list")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a round of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="ours; the rival has float32 (default: %(default)s)")
    parser.add_argument("--alone", choices=("ours", "rival"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"cases={args.cases}: {unknown[0]!r} is unknown; use some of {', '.join(CASES)}")
    if args.alone != "rival":
        use_cores()
        keep_memory()  # as train.py does; a rival in the same process has it, too
    if args.alone:
        print(json.dumps(_measure_alone(args.alone, names[0], args.dtype)))
        return
    results = [_compare(name, args.dtype, args) for name in names]
    show(results, "noisy images per second", args.json)
    for result in results:
        print(
            f"{result['case']}: first step after {result['first_step_seconds_ours']} s (rival"
            f" {result['first_step_seconds_rival']} s), peak memory {result['peak_mib_ours']} MiB (rival"
            f" {result['peak_mib_rival']} MiB)"
        )


if __name__ == "__main__":
    main()
