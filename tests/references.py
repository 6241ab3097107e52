"""Reference networks in float64, of plain sums, and random variables for them."""

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency.models.cifar_resnet import CifarResNet


def small_model(**kwargs):
    return CifarResNet(num_classes=4, depth=8, **kwargs)


def shapes(model, image_shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))


def random_variables(model, image_shape, seed=0):
    """Random parameters and batch statistics, of a size that keeps the activations near one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, size=shape)
        else:
            value = 0.3 * rng.normal(size=shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(model, image_shape))


class Reference:
    """Layers in float64 that look up their variables by PyTorch-like names ("layer1_0/conv1")."""

    def __init__(self, variables):
        flat, _ = jax.tree_util.tree_flatten_with_path(variables)
        self.leaves = {"/".join(key.key for key in path): np.float64(leaf) for path, leaf in flat}
        self.used = set()

    def get(self, name):
        self.used.add(name)
        return self.leaves[name]

    def conv(self, x, name, stride=1):
        kernel = self.get(f"params/{name}/kernel")
        pad = kernel.shape[0] // 2
        height, width = (-(-size // stride) for size in x.shape[1:3])
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        total = 0
        for i, row in enumerate(kernel):
            for j, matrix in enumerate(row):
                total = total + x[:, i::stride, j::stride][:, :height, :width] @ matrix
        return total

    def norm(self, x, name):
        mean, var = self.get(f"batch_stats/{name}/mean"), self.get(f"batch_stats/{name}/var")
        scale, bias = self.get(f"params/{name}/scale"), self.get(f"params/{name}/bias")
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def shortcut(self, x, name, stride):
        if f"params/{name}/downsample_0/kernel" not in self.leaves:
            return x
        return self.norm(self.conv(x, f"{name}/downsample_0", stride), f"{name}/downsample_1")

    def classify(self, x):
        logits = x.mean(axis=(1, 2)) @ self.get("params/fc/kernel") + self.get("params/fc/bias")
        assert self.used == set(self.leaves)  # nothing in the model that the reference does not have
        return logits


def relu(x):
    return np.maximum(x, 0)


def reference_lenet(params, x):
    for name in ("Conv_0", "Conv_1"):
        kernel, bias = np.float64(params[name]["kernel"]), np.float64(params[name]["bias"])
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))  # [N, H', W', C, 5, 5]
        x = np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias, 0)
        corners = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        x = np.max(corners, axis=0)
    x = x.reshape(len(x), -1)
    x = np.maximum(x @ np.float64(params["Dense_0"]["kernel"]) + np.float64(params["Dense_0"]["bias"]), 0)
    return x @ np.float64(params["Dense_1"]["kernel"]) + np.float64(params["Dense_1"]["bias"])


def reference_cifar_resnet(net, x, depth):
    x = relu(net.norm(net.conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{stage}_{block}", 2 if stage > 1 and block == 0 else 1
            y = relu(net.norm(net.conv(x, f"{name}/conv1", stride), f"{name}/bn1"))
            y = net.norm(net.conv(y, f"{name}/conv2"), f"{name}/bn2")
            x = relu(net.shortcut(x, name, stride) + y)
    return net.classify(x)


def reference_wide_resnet(net, x, depth):
    x = net.conv(x, "conv1")
    for stage in (1, 2, 3):
        for block in range((depth - 4) // 6):
            name, stride = f"layer{stage}_{block}", 2 if stage > 1 and block == 0 else 1
            active = relu(net.norm(x, f"{name}/bn1"))
            y = relu(net.norm(net.conv(active, f"{name}/conv1", stride), f"{name}/bn2"))
            x = (net.conv(active, f"{name}/shortcut", stride) if block == 0 else x) + net.conv(y, f"{name}/conv2")
    return net.classify(relu(net.norm(x, "bn1")))


def reference_densenet(net, x):
    x = net.conv(x, "conv1")
    for block in (1, 2, 3):
        if block > 1:
            h, w = (size // 2 * 2 for size in x.shape[1:3])
            x = (x[:, :h:2, :w:2] + x[:, 1:h:2, :w:2] + x[:, :h:2, 1:w:2] + x[:, 1:h:2, 1:w:2]) / 4
        for layer in range(6):
            name = f"dense{block}_{layer}"
            y = net.conv(relu(net.norm(x, f"{name}/bn1")), f"{name}/conv1")
            y = net.conv(relu(net.norm(y, f"{name}/bn2")), f"{name}/conv2")
            x = np.concatenate([x, y], axis=-1)
    return net.classify(relu(net.norm(x, "bn")))


def reference_resnet50(net, x):
    x = relu(net.norm(net.conv(x, "conv1", 2), "bn1"))
    height, width = (-(-size // 2) for size in x.shape[1:3])
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.max([x[:, i::2, j::2][:, :height, :width] for i in range(3) for j in range(3)], axis=0)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}_{block}", 2 if stage > 1 and block == 0 else 1
            y = relu(net.norm(net.conv(x, f"{name}/conv1"), f"{name}/bn1"))
            y = relu(net.norm(net.conv(y, f"{name}/conv2", stride), f"{name}/bn2"))
            y = net.norm(net.conv(y, f"{name}/conv3"), f"{name}/bn3")
            x = relu(net.shortcut(x, name, stride) + y)
    return net.classify(x)
