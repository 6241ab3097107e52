"""The training step, the evaluation step, and the state that they change. No loop and no files here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from rs_consistency import data, methods, models, noise
from rs_consistency.common.errors import UserError
from rs_consistency.data.augment import AUGMENTATIONS
from rs_consistency.devices.compiler import pieces_of, repeat, training_compiler_options
from rs_consistency.devices.parallel import AXIS, replicated_sharding, spread, sum_over_devices
from rs_consistency.training.inputs import Inputs, StepSizes, part_positions

COPIES = "copies"  # the vmap axis of the M noisy copies
# (state, number of steps, feed) -> (state, metrics of the steps)
TrainSteps = Callable[..., tuple["TrainState", dict[str, jax.Array]]]


class TrainState(struct.PyTreeNode):
    """All that a run needs to go on: what a checkpoint holds.

    Attributes:
      step: number of optimizer steps taken, int32. It is the state of the input, too: which examples come next, and
        with what noise, is a function of config, seed, data and step.
      params: the model's parameters.
      model_state: what else the model keeps, such as running batch statistics; empty for some models.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What the model's `apply` takes."""
        return {"params": self.params, **self.model_state}


def make_model(config: ConfigDict) -> Any:
    """The flax module of a configuration, for its dataset: for `make_train_steps`, and anywhere in inference."""
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
        # Compiled, since a deep network that is initialized operation by operation takes minutes.
        model_state = dict(jax.jit(make_model(config).init)(key, jnp.zeros((1, *shape))))
    except (TypeError, ValueError, ZeroDivisionError) as error:  # shapes that vanish or do not match
        raise UserError(
            f"model={config.model!r} cannot take the {tuple(shape)} images of dataset {config.dataset.name!r}"
            f" ({str(error).splitlines()[0]}); use another model"
        ) from error
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, model_state=model_state, opt_state=optimizer.init(params)
    )


def restore_target(config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState:
    """Shapes, types and placement of the run's state, to restore a checkpoint into; nothing is computed."""
    # The state's structure does not depend on when the learning rate drops, so neither on the steps in an epoch.
    state = jax.eval_shape(lambda: create_state(config, make_optimizer(config, steps_per_epoch=1)))
    sharding = replicated_sharding(devices)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


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


class _Totals(NamedTuple):
    """What the parts of a batch add up to."""

    grads: Any
    metrics: dict[str, jax.Array]
    model_state: Any


def make_train_steps(
    config: ConfigDict,
    *,
    apply_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    sizes: StepSizes,
    inputs: Inputs,
    devices: Sequence[jax.Device],
    steps_per_call: int = 1,
) -> TrainSteps:
    """Compiles optimizer steps, each on M noisy copies of a batch, drawn on the devices.

    Args:
      config: the run's configuration.
      apply_fn: the `apply` of `make_model`.
      optimizer: from `make_optimizer`.
      sizes: from `step_sizes`.
      inputs: hands out the examples of a step.
      devices: which share the batch; the result does not depend on their number but for rounding.
      steps_per_call: S, the most steps that one call can take, with the same feed: in a compiled loop, so that the
        device does not wait for the host between them.

    Returns:
      `train_steps(state, number, *feed.args, **feed.parts) -> (state, metrics)`, which takes that number of steps, 1
      to S; `state` is consumed. `metrics` are arrays `[S]`, of which the first `number` count: `loss` and every loss
      term, averaged over the batch, and `param_norm`, the l2 norm of the new parameters and batch statistics, which is
      not finite exactly when the step ruined them.
    """
    objective = methods.make_objective(config)
    augment = AUGMENTATIONS[config.dataset.augment]
    quick_in_loops = config.model in models.QUICK_IN_LOOPS
    train_key, method_key, augment_key = (
        noise.stream_key(config.seed, stream)
        for stream in (noise.Stream.TRAIN, noise.Stream.METHOD, noise.Stream.AUGMENT)
    )

    def loss_fn(params: Any, model_state: Any, batch: methods.Batch) -> tuple[jax.Array, tuple[Any, Any]]:
        classifier = _Classifier(apply_fn, params, model_state)
        result = objective(classifier, batch)
        # The sum over this part of the batch: the sums over parts and devices then add up to the batch's mean.
        sums = {"loss": result.loss, **result.terms}
        sums = {name: values.sum() / sizes.examples for name, values in sums.items()}
        return sums["loss"], (sums, classifier.model_state)

    def one_part(state: TrainState, part: jax.Array, all_positions: jax.Array, examples: data.Examples) -> _Totals:
        positions = all_positions[part]  # [B] in the global batch
        images, labels, extra = jax.tree.map(lambda rows: rows[part], examples)
        images = augment(noise.keys_of(augment_key, state.step, positions), data.to_unit(images))
        draws = noise.training_noise(
            train_key, step=state.step, positions=positions, num_noise=config.num_noise, shape=images.shape[1:]
        )
        batch = methods.Batch(
            images=images,
            labels=labels,
            noise=config.sigma * draws,
            keys=noise.keys_of(method_key, state.step, positions),
            epoch=state.step // sizes.steps,
            extra=extra,
        )
        grads, (sums, model_state) = jax.grad(loss_fn, has_aux=True)(state.params, state.model_state, batch)
        return _Totals(grads, sums, model_state)

    def train_step(shard: jax.Array, state: TrainState, *args: Any, **parts: Any) -> tuple[TrainState, dict[str, Any]]:
        per_device = sizes.examples // config.accumulate_steps // len(devices)
        pieces = pieces_of(per_device, config.num_noise, devices[0].platform) if quick_in_loops else 1
        parts_of_step = config.accumulate_steps * pieces
        positions = jnp.asarray(part_positions(parts_of_step, sizes, len(devices)))[:, shard]  # [P, B]
        examples = inputs.examples(state.step, positions.reshape(-1), *args, **parts)
        examples = jax.tree.map(lambda rows: rows.reshape(*positions.shape, *rows.shape[1:]), examples)

        def add_part(part: jax.Array, totals: _Totals) -> _Totals:
            new = one_part(state.replace(model_state=totals.model_state), part, positions, examples)
            grads, metrics = jax.tree.map(jnp.add, (totals.grads, totals.metrics), (new.grads, new.metrics))
            return _Totals(grads, metrics, new.model_state)

        if len(positions) == 1:
            totals = one_part(state, 0, positions, examples)
        else:
            shapes = jax.eval_shape(lambda: one_part(state, 0, positions, examples))
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)._replace(
                model_state=state.model_state
            )
            totals = repeat(add_part, len(positions), nothing, compiled=quick_in_loops)
        grads, metrics = sum_over_devices((totals.grads, totals.metrics))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "param_norm": optax.tree.norm((params, totals.model_state))}
        new_state = TrainState(step=state.step + 1, params=params, model_state=totals.model_state, opt_state=opt_state)
        return new_state, metrics

    def train_steps(
        shard: jax.Array, state: TrainState, number: jax.Array, *args: Any, **parts: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if steps_per_call == 1:
            state, metrics = train_step(shard, state, *args, **parts)
            return state, jax.tree.map(lambda value: value[None], metrics)

        def one_more(index: jax.Array, done: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, metrics = train_step(shard, done[0], *args, **parts)
            return state, jax.tree.map(lambda kept, value: kept.at[index].set(value), done[1], metrics)

        shapes = jax.eval_shape(lambda: train_step(shard, state, *args, **parts)[1])
        nothing = jax.tree.map(lambda leaf: jnp.zeros((steps_per_call, *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, number, one_more, (state, nothing))

    return spread(
        train_steps,
        devices=devices,
        donate=(0,),
        compiler_options=training_compiler_options(devices[0].platform, matrix_products=quick_in_loops),
    )


def make_eval_step(
    config: ConfigDict, *, apply_fn: Callable[..., jax.Array], inputs: Inputs, devices: Sequence[jax.Device]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiles the count of correct predictions on one noisy copy of every image.

    Returns:
      `eval_step(variables, start, *feed.args, **feed.parts) -> (correct, seen)`, over the `eval_batch_size` images
      from number `start` on; places beyond the end are masked. The noise of an image depends on the seed and its
      index alone, so accuracies of different epochs are comparable.
    """
    key = noise.stream_key(config.seed, noise.Stream.EVAL)
    per_device = -(-config.eval_batch_size // len(devices))

    def eval_step(
        shard: jax.Array, variables: Mapping[str, Any], start: jax.Array, *args: Any, **parts: Any
    ) -> tuple[jax.Array, jax.Array]:
        place = shard * per_device + jnp.arange(per_device)
        index = start + place
        real = (place < config.eval_batch_size) & (index < inputs.num_test_examples)
        index = jnp.minimum(index, inputs.num_test_examples - 1)
        images, labels = inputs.test_examples(index, *args, **parts)
        draws = noise.addressed_noise(key, index, shape=images.shape[1:])
        logits = apply_fn(variables, data.to_unit(images) + config.sigma * draws, train=False)
        correct = real & (logits.argmax(axis=-1) == labels)
        return sum_over_devices((correct.sum(), real.sum()))

    return spread(eval_step, devices=devices)
