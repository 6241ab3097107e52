"""The smoothed classifier as an object, and the examples, run as a user would."""

import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import rs_consistency
from rs_consistency import SmoothedClassifier, UserError
from tests.helpers import ROOT


def two_classes(images):
    score = images.mean(axis=(1, 2, 3))
    return jnp.stack([0.5 - score, score - 0.5], axis=1)


def test_a_smoothed_classifier_gives_what_the_functions_give():
    images = np.random.default_rng(0).integers(256, size=(6, 4, 4, 1), dtype=np.uint8)
    smoothed = SmoothedClassifier(two_classes, sigma=0.5, num_classes=2)
    fixed = {"sigma": 0.5, "num_classes": 2}
    for mine, theirs in (
        (smoothed.certify(images, n=500, seed=3), rs_consistency.certify(two_classes, images, n=500, seed=3, **fixed)),
        (smoothed.predict(images, n=500), rs_consistency.predict(two_classes, images, n=500, **fixed)),
        (smoothed.decide(images, 0.1, n=500), rs_consistency.decide(two_classes, images, radius=0.1, n=500, **fixed)),
    ):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    assert repr(smoothed) == "SmoothedClassifier(two_classes, sigma=0.5, num_classes=2)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 0.5, 2), "apply_fn=None: give a function"),
        ((two_classes, 0.0, 2), "sigma=0.0: use a number greater than 0"),
        ((two_classes, 0.5, 0), "num_classes=0: use a whole number of at least 1"),
    ],
)
def test_what_cannot_be_smoothed_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SmoothedClassifier(*arguments)


@pytest.mark.parametrize("name", ["predict", "certify", "decide"])
def test_what_a_smoothed_classifier_has_is_not_given_again(name):
    smoothed = SmoothedClassifier(two_classes, sigma=0.5, num_classes=2)
    arguments = [np.zeros((1, 4, 4, 1)), *([0.1] if name == "decide" else [])]
    with pytest.raises(UserError, match=r"sigma=1.0: this smoothed classifier has sigma=0.5; leave it out"):
        getattr(smoothed, name)(*arguments, sigma=1.0)


def run_example(name, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_function_is_never_certified_beyond_its_boundary():
    out = run_example("certify_plain_function.py", "--n=2000")
    pairs = re.findall(r"radius ([\d.]+)  distance to the boundary ([\d.]+)", out)
    assert len(pairs) > 10 and all(float(radius) <= float(bound) + 1e-3 for radius, bound in pairs)
    assert 0.8 < float(re.search(r"ceiling [\d.]+\): ([\d.]+)", out)[1]) < 1


def test_a_denoiser_in_front_makes_radii_larger():
    out = run_example("certify_denoised.py", "--n=1000")
    without, behind = map(float, re.search(r"mean radius ([\d.]+) without, ([\d.]+) with", out).groups())
    assert behind > without


def test_an_nnx_network_is_trained_and_certified():
    out = run_example("certify_nnx_model.py", "--steps=60", "--n=500")
    assert int(re.search(r"nnx network: (\d+) of 10 correct", out)[1]) >= 5


def test_certificates_are_contradicted_under_float_noise_and_not_on_the_grid():
    out = run_example("false_certificates.py", "--n=500")
    rows = re.findall(r"^(.+?) +(float|grid) .* (\d+) of \d+$", out, re.MULTILINE)
    contradicted = {(title, sampler): int(number) for title, sampler, number in rows}
    assert contradicted.pop(("detector alone, a black image", "float")) == 1
    assert contradicted.pop(("nearest mean with detector, digits", "float")) > 10
    assert len(contradicted) == 4 and not any(contradicted.values())


def test_certificates_of_a_run_are_contradicted(trained):
    out = run_example("false_certificates.py", "--n=100", f"--workdir={trained}")
    assert re.search(r"^lenet with detector, digits +float .* [1-9]\d* of 20$", out, re.MULTILINE)
