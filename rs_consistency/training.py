"""The training step, the evaluation step, and the state that they change. No loop and no files here."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from rs_consistency import data, methods, models, noise
from rs_consistency.backend import training_compiler_options
from rs_consistency.errors import UserError
from rs_consistency.parallel import replicated_sharding, spread, sum_over_devices

# (state, images [N, H, W, C] uint8, labels [N], order [N]) -> (state, metrics)
TrainStep = Callable[..., tuple["TrainState", dict[str, jax.Array]]]


class TrainState(struct.PyTreeNode):
    """All that a run needs to go on: what a checkpoint holds.

    Attributes:
      step: number of optimizer steps taken, int32.
      params: the model's parameters.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


class StepSizes(NamedTuple):
    """How an epoch divides into steps.

    Attributes:
      examples: examples in a step, over all devices: batch_size / M.
      steps: steps in an epoch, the last one filled up from the start of the same order.
    """

    examples: int
    steps: int


def step_sizes(config: ConfigDict, num_examples: int) -> StepSizes:
    """The published step: `batch_size` noisy images, M copies of batch_size / M examples."""
    examples = config.batch_size // config.num_noise
    return StepSizes(examples, -(-num_examples // examples))


def make_model(config: ConfigDict) -> Any:
    """The flax module of a configuration, for its dataset."""
    info = data.dataset_info(config.dataset.name)
    return models.create_model(config.model, num_classes=info.num_classes, mean=info.mean, std=info.std)


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: times lr_gamma every lr_step_size epochs."""
    return optax.exponential_decay(
        config.optimizer.lr,
        # Optax counts in int32; a drop beyond that never comes.
        transition_steps=min(config.optimizer.lr_step_size * steps_per_epoch, 2**31 - 1),
        decay_rate=config.optimizer.lr_gamma,
        staircase=True,
    )


def make_optimizer(config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay, PyTorch's `SGD(weight_decay=...)`."""
    return optax.chain(
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(make_schedule(config, steps_per_epoch), momentum=config.optimizer.momentum),
    )


def create_state(config: ConfigDict, optimizer: optax.GradientTransformation) -> TrainState:
    """Initial state; a function of config and seed. A `UserError` when the model cannot take the dataset's images."""
    shape = data.dataset_info(config.dataset.name).image_shape
    key = noise.stream_key(config.seed, noise.Stream.INIT)
    try:
        params = make_model(config).init(key, jnp.zeros((1, *shape)))["params"]
    except (TypeError, ValueError, ZeroDivisionError) as error:  # shapes that vanish or do not match
        raise UserError(
            f"model={config.model!r} cannot take the {tuple(shape)} images of dataset {config.dataset.name!r}"
            f" ({str(error).splitlines()[0]}); use another model"
        ) from error
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def restore_target(config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState:
    """Shapes, types and placement of the run's state, to restore a checkpoint into; nothing is computed."""
    # The state's structure does not depend on when the learning rate drops, so neither on the steps in an epoch.
    state = jax.eval_shape(lambda: create_state(config, make_optimizer(config, steps_per_epoch=1)))
    sharding = replicated_sharding(devices)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def make_order(config: ConfigDict, num_examples: int) -> Callable[[int], jax.Array]:
    """Returns `order(epoch)`: the permutation `[N]` int32 of the examples, a function of seed and epoch."""
    key = noise.stream_key(config.seed, noise.Stream.ORDER)
    return jax.jit(lambda epoch: jax.random.permutation(noise.fold(key, epoch), num_examples))


def make_train_step(
    config: ConfigDict,
    *,
    apply_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    sizes: StepSizes,
    devices: Sequence[jax.Device],
) -> TrainStep:
    """Compiles one optimizer step on M noisy copies of a batch, drawn on the devices.

    Args:
      config: the run's configuration.
      apply_fn: the model's `apply`.
      optimizer: from `make_optimizer`.
      sizes: from `step_sizes`.
      devices: which share the batch; the result does not depend on their number but for rounding.

    Returns:
      `train_step(state, images, labels, order) -> (state, metrics)`; `state` is consumed. `metrics` are scalars:
      `loss` and every loss term, averaged over the batch, and `param_norm`, the l2 norm of the new parameters,
      which is not finite exactly when the step ruined them.
    """
    objective = methods.make_objective(
        config.method,
        consistency_lbd=config.consistency.lbd,
        consistency_eta=config.consistency.eta,
        consistency_form=config.consistency.form,
    )
    key = noise.stream_key(config.seed, noise.Stream.TRAIN)
    per_device = sizes.examples // len(devices)

    def loss_fn(
        params: Any, images: jax.Array, labels: jax.Array, draws: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        def noisy_logits(images: jax.Array, draws: jax.Array) -> jax.Array:
            def one_copy(draw: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, K]
                return apply_fn({"params": params}, images + config.sigma * draw, train=True)

            return jax.vmap(one_copy)(draws)

        result = objective(noisy_logits, images, labels, draws)
        # The sum over this device's part of the batch: the sums over devices then add up to the batch's mean.
        sums = {"loss": result.loss, **result.terms}
        sums = {name: values.sum() / sizes.examples for name, values in sums.items()}
        return sums["loss"], sums

    def train_step(
        shard: jax.Array,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        positions = shard * per_device + jnp.arange(per_device)  # [B] in the global batch
        place = (state.step % sizes.steps) * sizes.examples + positions
        chosen = order[place % order.shape[0]]
        batch = data.to_unit(images[chosen])
        draws = noise.training_noise(
            key, step=state.step, positions=positions, num_noise=config.num_noise, shape=images.shape[1:]
        )
        grads, sums = jax.grad(loss_fn, has_aux=True)(state.params, batch, labels[chosen], draws)
        grads, sums = sum_over_devices((grads, sums))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**sums, "param_norm": optax.tree.norm(params)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return spread(
        train_step,
        devices=devices,
        donate=(0,),
        compiler_options=training_compiler_options(devices[0].platform),
    )


def make_eval_step(
    config: ConfigDict, *, apply_fn: Callable[..., jax.Array], devices: Sequence[jax.Device]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiles the count of correct predictions on one noisy copy of every image.

    Returns:
      `eval_step(params, images [N, H, W, C] uint8, labels [N], start) -> (correct, seen)`, over the
      `eval_batch_size` images from `start` on; places beyond the end are masked. The noise of an image depends
      on the seed and its index alone, so accuracies of different epochs are comparable.
    """
    key = noise.stream_key(config.seed, noise.Stream.EVAL)
    per_device = -(-config.eval_batch_size // len(devices))

    def eval_step(
        shard: jax.Array, params: Any, images: jax.Array, labels: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        place = shard * per_device + jnp.arange(per_device)
        index = start + place
        real = (place < config.eval_batch_size) & (index < images.shape[0])
        index = jnp.minimum(index, images.shape[0] - 1)
        draws = noise.addressed_noise(key, index, shape=images.shape[1:])
        logits = apply_fn({"params": params}, data.to_unit(images[index]) + config.sigma * draws, train=False)
        correct = real & (logits.argmax(axis=-1) == labels[index])
        return sum_over_devices((correct.sum(), real.sum()))

    return spread(eval_step, devices=devices)
