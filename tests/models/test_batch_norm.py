"""Batch norm in training: running averages, and the same statistics under vmap and pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.references import Reference, random_variables, reference_cifar_resnet, relu, shapes, small_model


def train_pass(model, variables, images, weights):
    """Weighted sum of the logits, its gradient, the logits and the new batch statistics."""

    def loss(params):
        logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return (weights * logits).sum(), (logits, new["batch_stats"])

    (_, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return logits, stats, gradient


def test_training_updates_the_running_averages_and_uses_the_batch():
    model = small_model()
    variables = random_variables(model, (8, 8, 3))
    images = np.random.default_rng(1).normal(size=(6, 8, 8, 3)).astype(np.float32)
    _, new = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)

    net, inputs = Reference(variables), np.float64(images)
    for convolution, norm in (("conv1", "bn1"), ("layer1_0/conv1", "layer1_0/bn1")):
        x = net.conv(inputs, convolution)
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        module = new["batch_stats"]
        for part in norm.split("/"):
            module = module[part]
        for kind, batch in (("mean", mean), ("var", var)):
            want = 0.9 * net.get(f"batch_stats/{norm}/{kind}") + 0.1 * batch
            np.testing.assert_allclose(module[kind], want, atol=2e-6)  # float32 sums of 384 values
        scale, bias = net.get(f"params/{norm}/scale"), net.get(f"params/{norm}/bias")
        inputs = relu((x - mean) / np.sqrt(var + 1e-5) * scale + bias)


def test_epsilon_counts_where_the_variance_is_small():
    model = small_model()
    variables = random_variables(model, (8, 8, 3))
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf * 1e-5, variables["batch_stats"])
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    got = jax.jit(model.apply)(variables, images)
    want = reference_cifar_resnet(Reference(variables), np.float64(images), depth=8)
    np.testing.assert_allclose(got, want, atol=5e-6 * np.abs(want).max())  # as above


@pytest.fixture(scope="module")
def shared_batch():
    """Eight devices times two copies of two images, and what the flattened batch of 32 gives."""
    rng = np.random.default_rng(5)
    images = jnp.asarray(rng.normal(size=(8, 2, 2, 8, 8, 3)), jnp.float32)  # [D, M, B, H, W, C]
    images = images * jnp.arange(1.0, 9).reshape(8, 1, 1, 1, 1, 1)  # devices that differ in their statistics
    weights = jnp.asarray(rng.normal(size=(8, 2, 2, 4)), jnp.float32)
    variables = random_variables(small_model(), (8, 8, 3))
    flat = images.reshape(32, 8, 8, 3), weights.reshape(32, 4)  # [D, M, B, ...] -> [D*M*B, ...]
    want = jax.jit(functools.partial(train_pass, small_model()))(variables, *flat)
    return variables, images, weights, want


def assert_same(got, want):
    logits, stats, gradient = got
    # Float32 sums in another order through 8 layers; a ReLU near zero may turn, hence the gradient's wider limit.
    np.testing.assert_allclose(logits.reshape(32, 4), want[0], atol=5e-6 * np.abs(want[0]).max())
    assert relative_distance(stats, want[1]) < 2e-6
    assert relative_distance(gradient, want[2]) < 2e-5


def relative_distance(tree, other):
    """The largest of the leaves' norm of the difference over norm."""
    distances = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), tree, other)
    return max(jax.tree.leaves(distances))


def copies_pass(model, variables, images, weights):
    """As `train_pass` on `[M, B, ...]`, by vmap over the copies."""

    def loss(params):
        def one_copy(images):
            return model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])

        # out_axes=None: shared statistics are the same for all copies, and vmap checks that they are not mapped.
        logits, new = jax.vmap(one_copy, axis_name="copies", out_axes=(0, None))(images)
        return (weights * logits).sum(), (logits, new["batch_stats"])

    (_, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return logits, stats, gradient


def test_batch_norm_under_vmap_is_that_of_the_flattened_batch(shared_batch):
    variables, images, weights, want = shared_batch
    model = small_model(axis_name=("copies",))
    images, weights = images.reshape(16, 2, 8, 8, 3), weights.reshape(16, 2, 4)  # [D, M, B, ...] -> [D*M, B, ...]
    assert_same(jax.jit(functools.partial(copies_pass, model))(variables, images, weights), want)


def test_batch_norm_under_pmap_and_vmap_is_that_of_the_flattened_batch(shared_batch):
    variables, images, weights, want = shared_batch
    model = small_model(axis_name=("devices", "copies"))

    @functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0), out_axes=(0, None, None))
    def device_pass(variables, images, weights):
        logits, stats, gradient = copies_pass(model, variables, images, weights)
        return logits, stats, jax.lax.psum(gradient, "devices")

    assert_same(device_pass(variables, images, weights), want)


def test_batch_norm_of_single_devices_is_another_one(shared_batch):
    """The broken twin: without the devices' axis the comparison above must fail."""
    variables, images, weights, want = shared_batch
    first = jax.jit(lambda *args: copies_pass(small_model(axis_name=("copies",)), *args)[:2])
    logits, stats = first(variables, images[0], weights[0])
    assert np.abs(logits.reshape(4, 4) - want[0][:4]).max() > 0.1 * np.abs(want[0]).max()
    assert relative_distance(stats, want[1]) > 0.01  # a tenth of the difference of the batches


def test_bfloat16_keeps_float32_batch_statistics():
    model = small_model(dtype=jnp.bfloat16)
    variables, images = shapes(model, (8, 8, 3)), jnp.zeros((4, 8, 8, 3))
    logits, stats, gradient = jax.eval_shape(functools.partial(train_pass, model), variables, images, jnp.ones((4, 4)))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, stats, gradient))} == {jnp.dtype("float32")}
