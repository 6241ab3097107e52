"""LeNet and the CIFAR ResNets in PyTorch, with the weights of this library's models, for the benchmarks' rival."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """`rs_consistency.models.lenet.LeNet` for 28 x 28 x 1 images and 10 classes, images [N, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)])
        self.denses = nn.ModuleList([nn.Linear(800, 500), nn.Linear(500, 10)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.denses[1](F.relu(self.denses[0](x.flatten(1))))

    @torch.no_grad()
    def load(self, variables: Mapping[str, Any]) -> None:
        """Take the weights of the flax model."""
        params = variables["params"]
        for i in range(2):
            _load_conv(self.convs[i], params[f"Conv_{i}"])
        hidden = dict(params["Dense_0"])
        # Flax flattens [H, W, C], PyTorch [C, H, W].
        kernel = np.asarray(hidden["kernel"]).reshape(4, 4, 50, 500)
        hidden["kernel"] = kernel.transpose(2, 0, 1, 3).reshape(800, 500)
        _load_dense(self.denses[0], hidden)
        _load_dense(self.denses[1], params["Dense_1"])


class Block(nn.Module):
    """Two convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.changes = inputs != outputs
        if self.changes:
            self.downsample_0 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample_1 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample_1(self.downsample_0(x)) if self.changes else x))


class CifarResNet(nn.Module):
    """`rs_consistency.models.cifar_resnet.CifarResNet`, images [N, C, H, W]."""

    def __init__(self, depth: int, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        inputs = 16
        self.names = []
        for stage, outputs in enumerate((16, 32, 64), start=1):
            for block in range((depth - 2) // 6):
                name = f"layer{stage}_{block}"
                self.add_module(name, Block(inputs, outputs, 2 if stage > 1 and block == 0 else 1))
                self.names.append(name)
                inputs = outputs
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))

    @torch.no_grad()
    def load(self, variables: Mapping[str, Any]) -> None:
        """Take the weights and batch statistics of the flax model."""
        params, stats = variables["params"], variables["batch_stats"]
        _load_conv(self.conv1, params["conv1"])
        _load_norm(self.bn1, params["bn1"], stats["bn1"])
        for name in self.names:
            for layer, values in params[name].items():
                module = self.get_submodule(f"{name}.{layer}")
                if isinstance(module, nn.Conv2d):
                    _load_conv(module, values)
                else:
                    _load_norm(module, values, stats[name][layer])
        _load_dense(self.fc, params["fc"])


def _load_conv(module: nn.Conv2d, params: Mapping[str, Any]) -> None:
    module.weight.copy_(_tensor(np.asarray(params["kernel"]).transpose(3, 2, 0, 1)))
    if module.bias is not None:
        module.bias.copy_(_tensor(params["bias"]))


def _load_dense(module: nn.Linear, params: Mapping[str, Any]) -> None:
    module.weight.copy_(_tensor(np.asarray(params["kernel"]).T))
    module.bias.copy_(_tensor(params["bias"]))


def _load_norm(module: nn.BatchNorm2d, params: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
    module.weight.copy_(_tensor(params["scale"]))
    module.bias.copy_(_tensor(params["bias"]))
    module.running_mean.copy_(_tensor(stats["mean"]))
    module.running_var.copy_(_tensor(stats["var"]))


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))
