"""The training step, the evaluation step, and the state that they change. No loop and no files here."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from rs_consistency import data, methods, models, noise
from rs_consistency.common.errors import UserError, first_line
from rs_consistency.data.augment import AUGMENTATIONS
from rs_consistency.devices.compiler import pieces_of, repeat, steps_per_call, training_compiler_options
from rs_consistency.devices.memory import check_memory, least_bytes
from rs_consistency.devices.parallel import AXIS, replicated_sharding, spread, sum_over_devices
from rs_consistency.training.inputs import Inputs, part_positions

COPIES = "copies"  # the vmap axis of the M noisy copies


class TrainState(struct.PyTreeNode):
    """The state of a training run, as a checkpoint holds it.

    The number of optimizer steps taken is the state of the input, too: the next examples and their noise are a function
    of config, seed, data, step, and the weights.
    """

    step: jax.Array  # int32
    params: Any
    model_state: Any  # other variables, such as running batch statistics; empty for some models
    opt_state: optax.OptState
    weights: jax.Array | None = None  # [N] float32, of the examples in this epoch, where the method chooses them

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for the model's `apply`."""
        return {"params": self.params, **self.model_state}


def make_model(config: ConfigDict) -> Any:
    """Return the flax module of a configuration, for its dataset."""
    info = data.dataset_info(config.dataset.name)
    return models.create_model(
        config.model,
        num_classes=info.num_classes,
        mean=info.mean,
        std=info.std,
        dtype=jnp.dtype(config.dtype),
        axis_name=(AXIS, COPIES),
    )


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate by step: it is multiplied by lr_gamma every lr_step_size epochs."""
    return optax.exponential_decay(
        config.optimizer.lr,
        # Optax counts in int32; a drop beyond that never comes.
        transition_steps=min(config.optimizer.lr_step_size * steps_per_epoch, 2**31 - 1),
        decay_rate=config.optimizer.lr_gamma,
        staircase=True,
    )


def make_optimizer(config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return SGD with momentum and coupled weight decay, which is PyTorch's `SGD(weight_decay=...)`."""
    return optax.chain(
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(make_schedule(config, steps_per_epoch), momentum=config.optimizer.momentum),
    )


def create_state(config: ConfigDict, num_examples: int = 1) -> TrainState:
    """Return the initial state for config and seed. A `UserError` says that the model cannot take the images.

    `num_examples` is N, for a method that weighs the examples.
    """
    shape = data.dataset_info(config.dataset.name).image_shape
    key = noise.stream_key(config.seed, noise.Stream.INIT)
    try:
        # Compiled, since a deep network that is initialized operation by operation takes minutes.
        model_state = dict(jax.jit(make_model(config).init)(key, jnp.zeros((1, *shape))))
    except (TypeError, ValueError, ZeroDivisionError) as error:  # shapes that vanish or do not match
        raise UserError(
            f"model={config.model!r} cannot take the {tuple(shape)} images of dataset {config.dataset.name!r}"
            f" ({first_line(error)}); use another model"
        ) from error
    params = model_state.pop("params")
    # The initial state of the optimizer does not depend on when the learning rate drops, so on no length of an epoch.
    opt_state = make_optimizer(config, steps_per_epoch=1).init(params)
    weights = jnp.ones(num_examples, jnp.float32) if methods.METHODS[config.method].choose else None
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, weights)


def restore_target(config: ConfigDict, devices: Sequence[jax.Device], num_examples: int = 1) -> TrainState:
    """Return shapes, types and placement of the run's state, to restore a checkpoint into. Nothing is computed."""
    state = jax.eval_shape(lambda: create_state(config, num_examples))
    sharding = replicated_sharding(devices)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


class Steps(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      train: `train(state, number, *feed.args, **feed.parts) -> (state, metrics)` takes 1 to `per_call` optimizer steps,
        each on M noisy copies of a batch, drawn on the devices. `state` is consumed. `metrics` are arrays `[per_call]`,
        of which the first `number` count: `loss` and every loss term, averaged over the batch, and `param_norm`, the l2
        norm of the new parameters and batch statistics. It is not finite exactly when the step ruined them.
      evaluate: `evaluate(variables, start, *feed.args, **feed.parts) -> (correct, seen)` counts correct predictions on
        one noisy copy of the `eval_batch_size` test images from number `start` on. Places beyond the end do not count.
        The noise of an image depends on the seed and its index alone, so accuracies of different epochs compare.
      per_call: the most steps of a call of `train`. They have the same feed.
    """

    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    per_call: int


def compile_steps(config: ConfigDict, inputs: Inputs, *, per_call: int | None = None) -> Steps:
    """Compile the training step and the evaluation step of a run; XLA does so at their first calls.

    The number of devices of the inputs changes results by rounding only. Up to `per_call` steps are a compiled loop, in
    which the device does not wait for the host. None: as many as suit the platform and the inputs.
    """
    platform, num_devices = inputs.devices[0].platform, len(inputs.devices)
    if per_call is None:
        per_call = steps_per_call(platform) if inputs.same_feed else 1
    quick_in_loops = config.model in models.QUICK_IN_LOOPS
    pieces = _pieces(config, platform, num_devices, same_feed=inputs.same_feed)
    setup = _Setup(
        config=config,
        inputs=inputs,
        apply_fn=make_model(config).apply,
        objective=methods.make_objective(config),
        optimizer=make_optimizer(config, inputs.sizes.steps),
        keys={stream: noise.stream_key(config.seed, stream) for stream in noise.Stream},
        positions=part_positions(config.accumulate_steps * pieces, inputs.sizes, num_devices),
        per_call=per_call,
    )
    train = spread(
        functools.partial(_train_steps, setup),
        devices=inputs.devices,
        donate=(0,),
        compiler_options=training_compiler_options(platform, matrix_products=quick_in_loops),
    )
    return Steps(train, spread(functools.partial(_evaluate, setup), devices=inputs.devices), per_call)


def _pieces(config: ConfigDict, platform: str, num_devices: int, *, same_feed: bool) -> int:
    """Return the number of pieces of a part of a step on a device."""
    if config.model not in models.QUICK_IN_LOOPS or not same_feed:
        return 1  # the host cuts a streamed batch into the parts that the configuration asks for
    per_device = config.batch_size // config.num_noise // config.accumulate_steps // num_devices
    return pieces_of(per_device, config.num_noise, platform)


def check_room(config: ConfigDict, devices: Sequence[jax.Device], *, same_feed: bool) -> None:
    """Raise a `UserError` for a batch that surely has no room in memory: nothing is allocated, compiled or written.

    It counts the images of a step, and the largest layer of the network on the noisy images that it takes at a time.
    Arguments as in `Inputs`.
    """
    examples = config.batch_size // config.num_noise // config.accumulate_steps // len(devices)
    shape = data.dataset_info(config.dataset.name).image_shape
    check_memory("batch_size", config.batch_size, examples * math.prod(shape), devices)
    pieces = _pieces(config, devices[0].platform, len(devices), same_feed=same_feed)
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        traced = jax.make_jaxpr(lambda image: make_model(config).init_with_output(jax.random.key(0), image)[0])(one)
    except (TypeError, ValueError, ZeroDivisionError):
        return  # `create_state` says that the model cannot take the images
    rows = {
        "batch_size": examples // pieces * config.num_noise,
        "eval_batch_size": -(-config.eval_batch_size // len(devices)),
    }
    for name, number in rows.items():
        check_memory(name, config[name], number * least_bytes(traced.jaxpr, one), devices)


class _Setup(NamedTuple):
    """The constants of the compiled functions."""

    config: ConfigDict
    inputs: Inputs
    apply_fn: Callable[..., Any]
    objective: Callable[[methods.Classifier, methods.Batch], methods.Objective]
    optimizer: optax.GradientTransformation
    keys: Mapping[noise.Stream, jax.Array]
    positions: np.ndarray  # [P, D, B]: the batch in P parts, computed one after the other
    per_call: int


def _train_steps(
    setup: _Setup, shard: jax.Array, state: TrainState, number: jax.Array, *args: Any, **parts: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take several steps with the same feed; return the state and the metrics `[per_call]`."""
    if setup.per_call == 1:
        state, metrics = _train_step(setup, shard, state, *args, **parts)
        return state, jax.tree.map(lambda value: value[None], metrics)

    def one_more(index: jax.Array, done: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
        state, metrics = _train_step(setup, shard, done[0], *args, **parts)
        return state, jax.tree.map(lambda kept, value: kept.at[index].set(value), done[1], metrics)

    shapes = jax.eval_shape(lambda: _train_step(setup, shard, state, *args, **parts)[1])
    nothing = jax.tree.map(lambda leaf: jnp.zeros((setup.per_call, *leaf.shape), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, number, one_more, (state, nothing))


_Sums = tuple[Any, dict[str, jax.Array], Any]  # gradients and metrics of some parts of a batch; model state after them


def _train_step(
    setup: _Setup, shard: jax.Array, state: TrainState, *args: Any, **parts: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Add up the gradients of the batch's parts and of all devices, and update the parameters."""
    positions = jnp.asarray(setup.positions)[:, shard]  # [P, B]
    examples = setup.inputs.examples(state.step, positions.reshape(-1), *args, **parts)
    examples = jax.tree.map(lambda rows: rows.reshape(*positions.shape, *rows.shape[1:]), examples)

    def sums_of(part: jax.Array | int, model_state: Any) -> _Sums:
        own = state.replace(model_state=model_state)
        return _gradient(setup, own, positions[part], jax.tree.map(lambda rows: rows[part], examples))

    def add_part(part: jax.Array | int, sums: _Sums) -> _Sums:
        *before, model_state = sums
        *new, model_state = sums_of(part, model_state)
        return *jax.tree.map(jnp.add, before, new), model_state

    if len(positions) == 1:
        sums = sums_of(0, state.model_state)
    else:
        shapes = jax.eval_shape(lambda: sums_of(0, state.model_state))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        compiled = setup.config.model in models.QUICK_IN_LOOPS
        sums = repeat(add_part, len(positions), (*nothing[:-1], state.model_state), compiled=compiled)
    grads, metrics, model_state = *sum_over_devices(sums[:-1]), sums[-1]
    updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "param_norm": optax.tree.norm((params, model_state))}
    state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
    return state, metrics


def _gradient(setup: _Setup, state: TrainState, positions: jax.Array, examples: data.Examples) -> _Sums:
    """Return the gradient of the loss of one part: the examples at `positions` `[B]` of the step's global batch."""
    config, keys = setup.config, setup.keys
    augment = AUGMENTATIONS[config.dataset.augment]
    augment_keys = noise.keys_of(keys[noise.Stream.AUGMENT], state.step, positions)
    images = augment(augment_keys, data.to_unit(examples.images))
    draws = noise.training_noise(
        keys[noise.Stream.TRAIN],
        step=state.step,
        positions=positions,
        num_noise=config.num_noise,
        shape=images.shape[1:],
    )
    batch = methods.Batch(
        images=images,
        labels=examples.labels,
        noise=config.sigma * draws,
        keys=noise.keys_of(keys[noise.Stream.METHOD], state.step, positions),
        epoch=state.step // setup.inputs.sizes.steps,
        extra=examples.extra,
    )
    loss_fn = jax.grad(functools.partial(_loss, setup), has_aux=True)
    grads, (metrics, model_state) = loss_fn(state.params, state.model_state, batch)
    return grads, metrics, model_state


def _loss(setup: _Setup, params: Any, model_state: Any, batch: methods.Batch) -> tuple[jax.Array, tuple[Any, Any]]:
    """Return the loss of one part of a batch, its terms, and the model's state after it."""
    classifier = _Classifier(setup.apply_fn, params, model_state)
    result = setup.objective(classifier, batch)
    # Sums over this part, divided by the whole batch: over parts and devices they add up to the batch's mean.
    sums = {"loss": result.loss, **result.terms}
    sums = {name: values.sum() / setup.inputs.sizes.examples for name, values in sums.items()}
    return sums["loss"], (sums, classifier.model_state)


class _Classifier:
    """The model while one gradient is traced: `methods.base.Classifier`.

    It is made and used inside a single trace; `model_state` is then the state after all training-mode calls, in their
    order, as a model with running statistics would have it.
    """

    def __init__(self, apply_fn: Callable[..., Any], params: Any, model_state: Any) -> None:
        self._apply_fn = apply_fn
        self._params = params
        self.model_state = model_state

    def noisy(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        def one_copy(draw: jax.Array) -> tuple[jax.Array, Any]:  # [B, H, W, C] -> [B, K]
            variables = {"params": self._params, **self.model_state}
            return self._apply_fn(variables, images + draw, train=True, mutable=list(self.model_state))

        # The running statistics are averages over the copies already, so they come out without an axis M.
        logits, model_state = jax.vmap(one_copy, axis_name=COPIES, out_axes=(0, None))(noise)
        self.model_state = dict(model_state)
        return logits

    def clean(self, images: jax.Array) -> jax.Array:
        return self.noisy(images, jnp.zeros((1, 1, 1, 1, 1)))[0]

    def frozen(self, images: jax.Array) -> jax.Array:
        variables = jax.lax.stop_gradient({"params": self._params, **self.model_state})
        return self._apply_fn(variables, images, train=False)


def _evaluate(
    setup: _Setup, shard: jax.Array, variables: Mapping[str, Any], start: jax.Array, *args: Any, **parts: Any
) -> tuple[jax.Array, jax.Array]:
    """Count the correct predictions on noisy test images, and the images: `Steps.evaluate` on one device."""
    config, inputs = setup.config, setup.inputs
    per_device = -(-config.eval_batch_size // len(inputs.devices))
    place = shard * per_device + jnp.arange(per_device)
    index = start + place
    real = (place < config.eval_batch_size) & (index < inputs.num_test_examples)
    index = jnp.minimum(index, inputs.num_test_examples - 1)
    images, labels = inputs.test_examples(index, *args, **parts)
    draws = noise.addressed_noise(setup.keys[noise.Stream.EVAL], index, shape=images.shape[1:])
    logits = setup.apply_fn(variables, data.to_unit(images) + config.sigma * draws, train=False)
    correct = real & (logits.argmax(axis=-1) == labels)
    return sum_over_devices((correct.sum(), real.sum()))
