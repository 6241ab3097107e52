"""Every public function with every argument replaced by bad values: a `UserError` in one line, or a valid result."""

from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rs_consistency
from rs_consistency import UserError, attacks, certify, data, losses, methods, models, noise
from rs_consistency.certificates import joint, selection
from rs_consistency.common import checks
from rs_consistency.smoothing.certify import conclude
from rs_consistency.smoothing.predict import conclude_prediction
from rs_consistency.statistics import (
    allocation,
    bounds,
    exact,
    intervals,
    limits,
    rounded_gaussian,
    samplers,
    sequential,
    series,
)


class Reached(BaseException):
    """All checks were passed: the classifier is traced. So no check comes after a compilation."""


def reach(*_):
    raise Reached


def brightness(images):
    return jnp.stack([images.sum(axis=(1, 2, 3)), -images.sum(axis=(1, 2, 3))], axis=-1)


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


class NeedsGradient:
    """An array of another library that NumPy cannot read."""

    ndim, shape, dtype = 1, (2,), "torch.float32"

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


IMAGES, LABELS = np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int32)
UNIT, NOISE = jnp.ones((2, 2, 2, 1)), jnp.zeros((3, 2, 2, 2, 1))
LOGITS = jnp.zeros((3, 2, 4))
COUNTS = np.array([[5, 1, 0], [3, 3, 0]])
KEY = noise.stream_key(0, noise.Stream.TRAIN)
TABLE = rounded_gaussian.grid_table(0.01)
ASKED = {"apply_fn": reach, "images": IMAGES, "indices": [0, 1], "sigma": 0.5, "num_classes": 2, "seed": 0, "n": 100}
ASKED |= {"alpha": 0.01, "sampler": "grid", "precision": "highest", "batch_size": 8, "devices": jax.devices()[:1]}
ASKED["progress"] = False
ATTACK = {"apply_fn": brightness, "images": UNIT, "labels": LABELS, "noise": NOISE, "num_steps": 1}


def attacked(images, apply_fn=reach, **settings):
    return rs_consistency.SmoothedClassifier(apply_fn, 0.5, 2).attack(images, **settings)


# Function -> valid arguments, by name.
CALLS = {
    certify: {**ASKED, "n0": 10, "bound": "randomized", "tolerance": 0.1},
    rs_consistency.decide: {**ASKED, "n0": 10, "radius": 0.1},
    rs_consistency.predict: ASKED,
    rs_consistency.attack: {**ASKED, "copies": 2, "steps": 2, "restarts": 2},
    attacked: {"images": IMAGES, "n": 100},
    rs_consistency.SmoothedClassifier: {"apply_fn": reach, "sigma": 0.5, "num_classes": 2},
    conclude: {"counts0": COUNTS, "counts": COUNTS, "alpha": 0.1, "sigma": 0.5},
    conclude_prediction: {"counts": COUNTS, "alpha": 0.1},
    bounds.lower_confidence_bound: {"count": [5, 6], "n": [10, 10], "alpha": [0.1, 0.1]},
    bounds.upper_confidence_bound: {"count": 5, "n": 10, "alpha": 0.1},
    bounds.certified_radius: {"count": 5, "n": 10, "alpha": 0.1, "sigma": [0.5, 1.0]},
    bounds.randomized_lower_bound: {"count": 5, "n": 10, "alpha": 0.1, "uniform": [0.5, 1.0]},
    bounds.certify_votes: {
        "count": [5, 5], "runner_up": [1, 1], "n": 10, "alpha": 0.1, "sigma": 0.5, "bound": "two_class", "slack": 0.0,
        "alpha_share": 0.9,
    },
    bounds.radius_ceiling: {"n": [10, 20], "alpha": 0.1, "sigma": 0.5},
    bounds.share_of: {"alpha_share": 0.5, "bound": "two_class"},
    bounds.most_of_others: {"counts": COUNTS, "selected": LABELS},
    bounds.p_value_of: {"most": [5, 4], "runner_up": [3, 4], "n": [10, 9], "slack": 0.001},
    samplers.noise_law: {"sampler": "float", "sigma": 0.5, "dimension": 4, "steps": 255},
    rounded_gaussian.sampler_error: {"sigma": 0.01, "dimension": 16, "steps": 255},
    sequential.log_evidence: {"hits": [5, 6], "votes": 9, "p0": [0.5, 0.6]},
    sequential.decide: {"hits": [5, 6], "votes": 9, "radius": [0.5, 1], "sigma": 0.5, "alpha": 0.1, "slack": 0.0},
    allocation.pilot_votes: {"n0": 10, "tolerance": 0.1, "bound": "randomized"},
    allocation.votes_for_tolerance: {
        "count0": [5, 6], "n0": 10, "n": 20, "tolerance": 0.1, "alpha": 0.1, "sigma": 0.5, "slack": 0.0,
    },
    limits.fewest_votes: {"alpha": 0.1, "bound": "two_class", "alpha_share": 0.9, "slack": 0.0},
    limits.check_certificates: {"n": 100, "alpha": 0.1},
    limits.check_predictions: {"n": 100, "alpha": 0.1, "slack": 0.0},
    limits.check_attacks: {"n": 100, "alpha": 0.1, "slack": 0.0},
    limits.check_decisions: {"n": 100, "alpha": 0.1, "radius": 0.1, "sigma": 0.5},
    exact.proves_radius: {
        "n": 100, "count": 99, "radius": Decimal("0.1"), "sigma": 0.5, "alpha": 0.1, "eps": 0, "bound": "two_class",
        "runner_up": 1, "alpha_share": 0.9,
    },
    exact.proves_decision: {"hits": 9, "votes": 10, "radius": 0.1, "certified": True, "sigma": 0.5, "alpha": 0.1},
    exact.proves_prediction: {"n": 100, "count": 90, "runner_up": 5, "alpha": 0.1, "eps": 0},
    exact.float_above: {"value": 0.1},
    series.within: {"a": Fraction(1, 2), "bits": 64},
    series.pi: {"bits": 64},
    intervals.binomial_interval: {"successes": [3, 4], "trials": 10, "level": 0.9},
    intervals.standard_error: {"values": [1.0, 2.0], "population": 9},
    intervals.bootstrap_interval: {"values": [1.0, 1.0], "seed": 0, "samples": 9, "level": 0.9},
    intervals.paired_difference: {"a": [1.0, 2.0], "b": [0.0, 1.0], "seed": 0, "level": 0.9},
    joint.wrong_at_most: {"num_images": 10, "alpha": 0.1, "delta": 0.1},
    losses.log_softmax: {"logits": LOGITS},
    losses.log_mean_softmax: {"logits": LOGITS},
    losses.cross_entropy: {"logits": LOGITS, "labels": LABELS},
    losses.cross_entropies: {"logits": LOGITS, "labels": LABELS},
    losses.consistency: {"logits": LOGITS, "lbd": 1.0, "eta": 0.5, "form": "default"},
    losses.stability: {"clean_logits": LOGITS[0], "noisy_logits": LOGITS[0]},
    losses.macer: {"logits": LOGITS, "labels": LABELS, "sigma": 0.5, "beta": 1.0, "gamma": 8.0},
    losses.kl_divergence: {"log_target": LOGITS[0], "logits": LOGITS},
    attacks.smooth_adv: {**ATTACK, "epsilon": 0.5, "keys": jax.random.split(KEY, 2), "mean_over": 1},
    attacks.unbounded: {**ATTACK, "step_size": 0.5, "keep_step": 0},
    attacks.worst_noise: {**{k: v for k, v in ATTACK.items() if k != "labels"}, "log_target": LOGITS[0, :, :2],
                          "epsilon": 0.5},
    attacks.on_sphere: {**ATTACK, "step_size": 0.5},
    attacks.copies: {"apply_fn": brightness, "images": UNIT, "noise": NOISE},
    attacks.l2_norm: {"x": UNIT},
    attacks.unit: {"gradient": UNIT, "mean_over": 1},
    attacks.project: {"offset": UNIT, "radius": 0.5},
    noise.stream_key: {"seed": 0, "stream": noise.Stream.TRAIN},
    noise.training_noise: {"key": KEY, "step": 0, "positions": LABELS, "num_noise": 2, "shape": (2, 2, 1)},
    noise.keys_of: {"key": KEY, "step": 0, "positions": LABELS},
    noise.blocks: {"keys": KEY[None], "size": 3},
    noise.whole_numbers: {
        "high_words": np.zeros(2, np.uint32), "low_words": np.zeros(2, np.uint32), "packed": TABLE.packed,
        "low": TABLE.low, "lookup": "gather",
    },
    noise.bound_uniform: {"seed": 0, "indices": LABELS},
    noise.weighted_draws: {"key": KEY, "weights": np.ones(3)},
    models.create_model: {
        "name": "lenet", "num_classes": 10, "mean": (0.5,), "std": (0.5,), "dtype": "float32", "axis_name": (),
    },
    models.count_parameters: {"variables": {"params": {}}},
    data.load: {"name": "mnist_subset", "split": "test", "data_dir": "", "cache_dir": ""},
    data.dataset_info: {"name": "mnist_subset"},
    data.to_unit: {"images": IMAGES},
    methods.make_objective: {"config": None},
    selection.parse_shard: {"text": "1/2"},
}  # fmt: skip

LONG = "x" * 100_000
SINGLE = {
    "None": None, "True": True, "text": "1", "long text": LONG, "complex": 0.5 + 0.5j, "NaN": float("nan"),
    "infinite": float("inf"), "-1": -1, "-0.0": -0.0, "1.5": 1.5, "1e300": 1e300, "10**400": 10**400,
    "Fraction": Fraction(10**400, 3), "unprintable int": -(10**5000), "Decimal": Decimal("1e-999999999"),
    "2**31": 2**31, "2**63": 2**63, "longdouble": np.longdouble(0.5), "bfloat16": jnp.bfloat16(0.5),
    "complex64": np.complex64(0.5 + 1j), "time": np.timedelta64(5, "ns"), "masked": np.ma.masked,
    "long list": list(range(100_000)), "dict": {}, "set": {1}, "object": object(), "unprintable": Unprintable(),
    "function": len, "of another library": NeedsGradient(), "key": jax.random.key(0), "large array": np.ones(100_000),
    "shape": jax.ShapeDtypeStruct((), jnp.float32), "ragged": [[1, 2], [3]], "device": jax.devices()[0],
    "no devices": [], "numbers of devices": [0], "a device twice": jax.devices()[:1] * 2,
    "not a device": [jax.devices()[0], SimpleNamespace(platform="tpu")], "bytes": b"1", "0": 0, "uint8": np.uint8(3),
}  # fmt: skip
# Of the shape of a valid array.
ARRAYS = {
    "complex": lambda one: one * (1 + 1j),
    "objects": lambda one: one.astype(object),
    "texts": lambda one: one.astype(str),
    "booleans": lambda one: one.astype(bool),
    "float16": lambda one: one.astype(np.float16),
    "bfloat16": lambda one: jnp.asarray(one, jnp.bfloat16),
    "int8": lambda one: one.astype(np.int8),
    "longdouble": lambda one: one.astype(np.longdouble),
    "masked": lambda one: np.ma.masked_array(one, mask=np.ones(one.shape, bool)),
    "NaN": lambda one: one * np.nan,
    "infinite": lambda one: one * np.inf,
    "-1": lambda one: -one,
    "1.5": lambda one: one * 1.5,
    "300": lambda one: one.astype(np.int64) * 300,
    "2**40": lambda one: one.astype(np.int64) * 2**40,
    "uint64": lambda one: one.astype(np.uint64) * np.uint64(2**63),
    "times": lambda one: one.astype("m8[ns]"),
    "none": lambda one: one[:0],
    "more axes": lambda one: one[None],
    "fewer axes": lambda one: one[0],
    "read-only": lambda one: np.broadcast_to(np.float32(1), one.shape),
    "not contiguous": lambda one: np.asfortranarray(one)[::-1],
    "list": lambda one: one.tolist(),
    "shape": lambda one: jax.ShapeDtypeStruct(one.shape, jnp.float32),
}
# These have no valid meaning for any argument, so that a result would be a silent loss.
LOST = {"complex", "complex64", "masked", "time", "times"}


def outcome(function, arguments):
    """Return the fault of a call, "" for none, and whether the call was accepted."""
    try:
        function(**arguments)
    except Reached:
        return "", True
    except UserError as error:
        text = str(error)
        return (f"a message of {len(text)} characters" if len(text) > 500 or "\n" in text else ""), False
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}", False
    return "", True


def traced(function, arguments, name, value):
    """The outcome of a call with a traced argument."""
    found = []
    jax.eval_shape(lambda x: found.append(outcome(function, {**arguments, name: x})), value)
    return found[0]


def faults(function, arguments, single, arrays):
    """Every replacement of an argument that ends in another error, a long message, or a silent loss."""
    for name, valid in arguments.items():
        bad = {label: SINGLE[label] for label in single if (name, label) != ("size", "2**31")}  # valid, but slow
        is_array = isinstance(valid, list) or getattr(getattr(valid, "dtype", None), "kind", "") in tuple("iuf")
        if is_array:
            bad |= {label: ARRAYS[label](np.ones(np.shape(valid), np.float32)) for label in arrays}
        for label, value in bad.items():
            problem, accepted = outcome(function, {**arguments, name: value})
            if accepted and label in LOST:
                problem = "accepted"
            if problem:
                yield f"{name}={label}: {problem}"
        shape = jax.ShapeDtypeStruct(np.shape(valid) if is_array else (), jnp.float32)
        problem, _ = traced(function, arguments, name, shape)
        if problem:
            yield f"{name} traced: {problem}"


def _name(function):
    return f"{function.__module__.removeprefix('rs_consistency.')}.{function.__name__}"


@pytest.mark.slow
@pytest.mark.parametrize("function", CALLS, ids=_name)
def test_bad_arguments(function):
    valid = CALLS[function]
    assert function is methods.make_objective or outcome(function, valid) == ("", True)
    assert not list(faults(function, valid, SINGLE, ARRAYS))


_FEW = ("complex", "10**400", "ragged", "unprintable")


@pytest.mark.parametrize("function", CALLS, ids=_name)
def test_some_bad_arguments(function):
    assert not list(faults(function, CALLS[function], _FEW, ("complex", "masked")))


def test_a_function_without_checks_is_found():
    def unchecked(values):
        return np.asarray(values, np.float32).real.sum()

    found = " ".join(faults(unchecked, {"values": [1.0, 2.0]}, _FEW, ("complex", "masked")))
    for label in (*_FEW, "masked", "values traced"):
        assert label in found


def test_a_value_in_a_message_is_short_and_on_one_line():
    for value in (*SINGLE.values(), np.ones((300, 300)), "two\nlines", KEY, UNIT):
        text = checks.shown(value)
        assert 0 < len(text) < 150 and "\n" not in text


def test_a_small_value_is_shown_as_it_is():
    assert (
        checks.shown("grid") == "'grid'" and checks.shown(np.ones((60, 28))) == "<ndarray of float64, shape (60, 28)>"
    )


def _fails():
    raise RuntimeError("no such\ndetector")


MODELS = {
    "raises": (lambda x: [][1], "does not accept images .*list index out of range"),
    "tuple": (lambda x: (brightness(x), 1), "the model gives tuple for a batch"),
    "None": (lambda x: None, "the model gives NoneType"),
    "shape": (lambda x: brightness(x)[:, :1], r"the model gives \(8, 1\)"),
    "NaN": (lambda x: brightness(x) * jnp.nan, "the model gives NaN"),
    "complex": (lambda x: brightness(x) * 1j, "logits of the model=.*use numbers, not complex64"),
    "branches": (lambda x: brightness(x) if x.sum() > 0 else -brightness(x), "Attempted boolean conversion"),
    "NumPy": (lambda x: np.asarray(x), "does not accept images"),
    "callback": (
        lambda x: jax.pure_callback(lambda _: _fails(), jax.ShapeDtypeStruct((len(x), 2), jnp.float32), x),
        "the model calls a function on the host, which fails: .*detector",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_vote(kind):
    model, message = MODELS[kind]
    asked = {**ASKED, "n": 20, "n0": 5, "alpha": 0.1}
    with pytest.raises(UserError, match=message):
        certify(**{**asked, "apply_fn": model})


@pytest.mark.parametrize("dtype", [bool, jnp.bfloat16])
def test_models_with_logits_of_other_types_vote(dtype):
    asked = {**ASKED, "n": 20, "n0": 5, "alpha": 0.1, "apply_fn": lambda x: (brightness(x) > 0).astype(dtype)}
    assert certify(**asked).counts.sum() == 40


def test_no_certificate_inside_jit():
    with pytest.raises(UserError, match=r"cannot be traced by jax\.jit"):
        jax.jit(lambda: certify(**{**ASKED, "n0": 5}))()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_are_pure_jax_whatever_transforms_them(dtype):
    def loss(logits):
        return losses.consistency(logits, lbd=1.0) + losses.macer(logits, LABELS, sigma=0.5, beta=1.0, gamma=8.0)[0]

    logits = jax.ShapeDtypeStruct((3, 2, 4), dtype)
    for transformed in (jax.jit(loss), jax.grad(lambda logits: loss(logits).sum())):
        assert jax.eval_shape(transformed, logits).shape[-1] in (2, 4)
    over = jax.ShapeDtypeStruct((5, 3, 2, 4), dtype)
    assert jax.eval_shape(jax.vmap(loss), over).shape == (5, 2)
