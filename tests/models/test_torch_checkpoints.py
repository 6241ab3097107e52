"""Checkpoints of the published PyTorch code: names, shapes, layouts; and, where PyTorch is installed, the logits."""

import os
import pickle
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency import data, models
from rs_consistency.common.errors import UserError
from rs_consistency.models.torch_checkpoints import (
    ARCHITECTURES,
    export_torch,
    from_torch,
    read_torch_checkpoint,
    to_torch,
    with_input_layer,
)
from tests.helpers import needs_torch

DATASETS = {"lenet": "mnist", "resnet50": "imagenet"}
LAST_IN_BLOCK = {"resnet20": "bn2", "resnet110": "bn2", "resnet50": "bn3"}


def make(name):
    """A model of this library with random variables, batch statistics too, and logits of order 1."""
    info = data.dataset_info(DATASETS.get(name, "cifar10"))
    model = models.create_model(name, num_classes=info.num_classes, mean=info.mean, std=info.std)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *info.image_shape)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        fan_in = np.prod(leaf.shape[:-1]) if kind == "kernel" else 1
        values = rng.uniform(0.5, 1.5, leaf.shape) if kind in ("var", "scale") else rng.normal(size=leaf.shape)
        if kind == "scale" and path[-2].key == LAST_IN_BLOCK.get(name):
            values *= (
                0.2  # as after training: else every block adds its own to what comes through, and logits are 10,000
            )
        return np.float32(values * (0.1 if kind in ("bias", "mean") else 1) / np.sqrt(fan_in))

    return model, jax.tree.map_with_path(draw, shapes), info


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_round_trip_changes_nothing(name):
    _, variables, _ = make(name)
    state = to_torch(variables, name)
    assert all(key.startswith("1.module." if name == "resnet50" else "1.") for key in state)
    back = from_torch(state, name, dataset=DATASETS.get(name, "cifar10"))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_names_and_shapes_are_those_of_the_published_code():
    shapes = {name: value.shape for name, value in to_torch(make("lenet")[1], "lenet").items()}
    assert shapes == {
        "1.conv1.weight": (20, 1, 5, 5),
        "1.conv1.bias": (20,),
        "1.conv2.weight": (50, 20, 5, 5),
        "1.conv2.bias": (50,),
        "1.fc1.weight": (500, 800),
        "1.fc1.bias": (500,),
        "1.fc2.weight": (10, 500),
        "1.fc2.bias": (10,),
    }
    shapes = {name: value.shape for name, value in to_torch(make("resnet110")[1], "resnet110").items()}
    assert shapes["1.layer3.17.conv2.weight"] == (64, 64, 3, 3) and shapes["1.layer2.0.downsample.1.running_var"] == (
        32,
    )
    assert shapes["1.bn1.num_batches_tracked"] == () and shapes["1.fc.weight"] == (10, 64)
    shapes = {name: value.shape for name, value in to_torch(make("densenet40")[1], "densenet40").items()}
    assert shapes["1.features.block3.layer6.brc_2.conv.weight"] == (12, 48, 3, 3)
    assert shapes["1.features.norm_last.weight"] == (240,) and shapes["1.classifier.weight"] == (10, 240)
    shapes = {name: value.shape for name, value in to_torch(make("resnet50")[1], "resnet50").items()}
    assert shapes["1.module.layer4.2.conv3.weight"] == (2048, 512, 1, 1) and len(shapes) == 320


@pytest.mark.parametrize("prefix", ["", "module.", "1.", "1.module.", "module.1."])
def test_what_stands_in_front_of_all_names_does_not_matter(prefix):
    _, variables, _ = make("resnet20")
    plain = {name.removeprefix("1."): value for name, value in to_torch(variables, "resnet20").items()}
    given = {prefix + name: value for name, value in plain.items()}
    back = from_torch(given, "resnet20", dataset="cifar10")
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_normalization_that_was_saved_must_be_the_one_inside_the_model():
    _, variables, info = make("resnet20")
    state = to_torch(variables, "resnet20")
    state |= {"0.means": np.float32(info.mean), "0.sds": np.float32(info.std)}
    from_torch(state, "resnet20", dataset="cifar10")
    with pytest.raises(UserError, match=r"normalization means=.* is not that of svhn"):
        from_torch(state, "resnet20", dataset="svhn")


def test_what_stands_in_front_is_a_normalization_or_refused():
    _, variables, info = make("resnet20")
    state = to_torch(variables, "resnet20")
    # With its prefix left out it would silently take the place of the model's own.
    with pytest.raises(UserError, match=r"torch_checkpoint has 0.conv1.weight: what stands in front of the model"):
        from_torch({**state, "0.conv1.weight": state["1.conv1.weight"]}, "resnet20", dataset="cifar10")
    centered = {**state, "0.means": np.float32(info.mean)}
    with pytest.raises(UserError, match=r"has means, which does not fit torch_input=normalize; add --torch_input=cent"):
        from_torch(centered, "resnet20", dataset="cifar10")
    from_torch(centered, "resnet20", dataset="cifar10", input_layer="center")
    with pytest.raises(UserError, match=r"torch_input='whiten' is unknown"):
        from_torch(state, "resnet20", dataset="cifar10", input_layer="whiten")
    with pytest.raises(UserError, match=r"has the key 7, which is no name of a tensor"):
        from_torch({**state, 7: np.zeros(1)}, "resnet20", dataset="cifar10")


def test_the_layer_in_front_is_the_chosen_one():
    model, variables, info = make("resnet20")
    bare = models.create_model("resnet20", num_classes=info.num_classes)
    images = np.random.default_rng(1).uniform(size=(2, *info.image_shape)).astype(np.float32)
    mean, std = np.float32(info.mean), np.float32(info.std)
    for how, seen in {"normalize": (images - mean) / std, "center": images - mean, "none": images}.items():
        found = with_input_layer(model, how).apply(variables, images)
        np.testing.assert_allclose(found, bare.apply(variables, seen), atol=1e-5)
    with pytest.raises(UserError, match=r"torch_input=center: images of this dataset are not normalized; use none"):
        with_input_layer(make("lenet")[0], "center")


def test_tensors_that_do_not_fit_are_named():
    state = to_torch(make("lenet")[1], "lenet")
    with pytest.raises(UserError, match=r"torch_checkpoint has no conv1.bias, which lenet needs"):
        from_torch({name: value for name, value in state.items() if name != "1.conv1.bias"}, "lenet", dataset="mnist")
    with pytest.raises(UserError, match=r"extra.weight is unknown to lenet"):
        from_torch({**state, "1.extra.weight": np.zeros(1)}, "lenet", dataset="mnist")
    with pytest.raises(UserError, match=r"fc2.weight has shape \(12, 500\), lenet for mnist needs \(10, 500\)"):
        from_torch({**state, "1.fc2.weight": np.zeros((12, 500))}, "lenet", dataset="mnist")
    with pytest.raises(UserError, match=r"fc2.bias is not finite"):
        from_torch({**state, "1.fc2.bias": np.full(10, np.nan)}, "lenet", dataset="mnist")
    with pytest.raises(UserError, match=r"has no .*, which resnet20 needs; .*is it of another model"):
        from_torch(state, "resnet20", dataset="cifar10")
    with pytest.raises(UserError, match=r"model='wideresnet28_10' has no published PyTorch counterpart"):
        to_torch({}, "wideresnet28_10")


WRONG = {
    "complex": (np.zeros(10, np.complex64), r"1?fc2.bias is of the type complex64; give float32, float64, float16, bf"),
    "integers": (np.zeros(10, np.int64), r"fc2.bias is of the type int64"),
    "bool": (np.zeros(10, bool), r"fc2.bias is of the type bool"),
    "objects": (np.array([None] * 10), r"fc2.bias is of the type object"),
    "texts": (["a"] * 10, r"fc2.bias is of the type <U1"),
    "float8": (jnp.zeros(10, jnp.float8_e4m3fn), r"fc2.bias is of the type float8_e4m3fn"),
    "ragged": ([[0.0], [0.0, 1.0]], r"fc2.bias is a list, which is no array of numbers"),
    "none": (None, r"fc2.bias is of the type object"),
    "terabytes": (
        np.broadcast_to(np.float16(0), 10**12),
        r"fc2.bias has shape \(1000000000000,\), lenet for",
    ),
    "above float32": (np.full(10, 1e300), r"fc2.bias is not finite"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_array_of_floating_point_numbers_is_refused(kind):
    value, reason = WRONG[kind]
    state = to_torch(make("lenet")[1], "lenet")
    with pytest.raises(UserError, match=reason):
        from_torch({**state, "1.fc2.bias": value}, "lenet", dataset="mnist")
    variables = make("lenet")[1]
    variables["params"]["Dense_1"]["bias"] = value
    if kind != "terabytes":
        with pytest.raises(UserError, match=reason.replace("1?fc2.bias", "bias").replace("fc2.bias", "Dense_1/bias")):
            to_torch(variables, "lenet")


def test_floating_point_types_are_converted():
    _, variables, _ = make("lenet")
    state = to_torch(variables, "lenet")
    for dtype in (np.float16, jnp.bfloat16, np.float64):
        given = {name: value.astype(dtype) for name, value in state.items()}
        back = to_torch(from_torch(given, "lenet", dataset="mnist"), "lenet")
        for name, value in given.items():
            assert back[name].dtype == np.float32
            np.testing.assert_array_equal(back[name], value.astype(np.float32))


def test_arguments_and_names_that_are_none_are_refused():
    _, variables, info = make("resnet20")
    state = to_torch(variables, "resnet20")
    for name in ("x" * 1000, "\x1b[31m", "a\n", "caf\udce9", ("a",), 10**5):
        with pytest.raises(UserError, match=r"torch_checkpoint has the key .*which is no name of a tensor") as caught:
            from_torch({**state, name: np.zeros(1)}, "resnet20", dataset="cifar10")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 150
    for tensors in (None, [1, 2], "a", np.zeros(3)):
        with pytest.raises(UserError, match=r"torch_checkpoint=.*: give a state dictionary, name -> array"):
            from_torch(tensors, "resnet20", dataset="cifar10")
    for model in (None, ["lenet"], "vgg"):
        with pytest.raises(UserError, match=r"model=.* has no published PyTorch counterpart"):
            from_torch(state, model, dataset="cifar10")
        with pytest.raises(UserError, match=r"model=.* has no published PyTorch counterpart"):
            to_torch(variables, model)
    for means in (np.broadcast_to(np.float16(0), 10**12), np.float32([*info.mean, 0]), np.float32(0.5)):
        with pytest.raises(UserError, match=r"normalization means=.* is not that of cifar10"):
            from_torch({**state, "0.means": means}, "resnet20", dataset="cifar10", input_layer="center")


def test_variables_of_another_model_are_named(tmp_path):
    _, variables, _ = make("lenet")
    kernel = {"Dense_0": {"kernel": np.zeros((801, 500), np.float32), "bias": np.zeros(500, np.float32)}}
    for given, reason in (
        ({}, r"variables lack 'params/Conv_0/bias'; give `params` and `batch_stats` of a lenet"),
        (None, r"variables lack"),
        (
            {"params": {**variables["params"], "Dense_7": {"kernel": np.zeros(1)}}},
            r"unknown '.*Dense_7/kernel'",
        ),
        ({"params": {**variables["params"], **kernel}}, r"Dense_0/kernel has shape \(801, 500\), which no lenet has"),
        (make("resnet20")[1], r"variables (lack|have the unknown)"),
    ):
        with pytest.raises(UserError, match=reason):
            export_torch(given, "lenet", tmp_path / "a.pth")
    os.mkfifo(tmp_path / "fifo")  # as /dev/null, which an export would replace
    for path in (tmp_path, "", tmp_path / "fifo"):
        with pytest.raises(UserError, match=r"output=.* is not a regular file"):
            export_torch(variables, "lenet", path)
    with pytest.raises(UserError, match=r"its folder does not exist"):
        export_torch(variables, "lenet", tmp_path / "no" / "a.pth")
    for epoch in (-1, 0.5, "1", None, True):
        with pytest.raises(UserError, match=r"epoch="):
            export_torch(variables, "lenet", tmp_path / "a.pth", epoch=epoch)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fifo"]


def torch_network(name, torch, num_classes):
    """The published architecture, built of PyTorch's modules with the published names."""
    nn = torch.nn

    def conv(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, width, stride, bottleneck):
            super().__init__()
            outputs = 4 * width if bottleneck else width
            if bottleneck:
                layers = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            else:
                layers = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
            for number, layer in enumerate(layers, start=1):
                self.add_module(f"conv{number}", conv(*layer))
                self.add_module(f"bn{number}", nn.BatchNorm2d(layer[1]))
            self.count = len(layers)
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = x
            for number in range(1, self.count + 1):
                y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
                y = torch.relu(y) if number < self.count else y
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet(nn.Module):
        def __init__(self, blocks, widths, bottleneck):
            super().__init__()
            self.large = bottleneck
            inputs = 64 if bottleneck else 16
            self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False) if bottleneck else conv(3, inputs, 3)
            self.bn1 = nn.BatchNorm2d(inputs)
            for stage, (number, width) in enumerate(zip(blocks, widths, strict=True), start=1):
                layers = []
                for block in range(number):
                    layers.append(Block(inputs, width, 2 if stage > 1 and block == 0 else 1, bottleneck))
                    inputs = 4 * width if bottleneck else width
                self.add_module(f"layer{stage}", nn.Sequential(*layers))
            self.stages = len(blocks)
            self.fc = nn.Linear(inputs, num_classes)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = nn.functional.max_pool2d(x, 3, 2, 1) if self.large else x
            for stage in range(1, self.stages + 1):
                x = self.get_submodule(f"layer{stage}")(x)
            return self.fc(x.mean((2, 3)))

    class DenseLayer(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            for number, (i, o, size) in enumerate([(inputs, 48, 1), (48, 12, 3)], start=1):
                parts = {"norm": nn.BatchNorm2d(i), "relu": nn.ReLU(), "conv": conv(i, o, size)}
                layer = nn.Sequential()
                for part, module in parts.items():
                    layer.add_module(part, module)
                self.add_module(f"brc_{number}", layer)

        def forward(self, x):
            return torch.cat([x, self.brc_2(self.brc_1(x))], 1)

    class DenseNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential()
            self.features.add_module("conv0", conv(3, 24, 3))
            channels = 24
            for block in (1, 2, 3):
                layers = nn.Sequential()
                for layer in range(1, 7):
                    layers.add_module(f"layer{layer}", DenseLayer(channels))
                    channels += 12
                self.features.add_module(f"block{block}", layers)
                if block < 3:
                    self.features.add_module(f"trans{block}", nn.AvgPool2d(2))
            self.features.add_module("norm_last", nn.BatchNorm2d(channels))
            self.classifier = nn.Linear(channels, num_classes)

        def forward(self, x):
            return self.classifier(torch.relu(self.features(x)).mean((2, 3)))

    class LeNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
            self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, num_classes)

        def forward(self, x):
            for layer in (self.conv1, self.conv2):
                x = nn.functional.max_pool2d(torch.relu(layer(x)), 2)
            return self.fc2(torch.relu(self.fc1(x.flatten(1))))

    if name == "lenet":
        return LeNet()
    if name == "densenet40":
        return DenseNet()
    if name == "resnet50":
        return nn.DataParallel(ResNet((3, 4, 6, 3), (64, 128, 256, 512), bottleneck=True))
    return ResNet([(int(name[6:]) - 2) // 6] * 3, (16, 32, 64), bottleneck=False)


@needs_torch
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_pytorch_both_ways(name, tmp_path):
    import torch

    model, variables, info = make(name)

    class Normalize(torch.nn.Module):
        def forward(self, x):
            mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
            return (x - mean) / std

    network = torch.nn.Sequential(
        Normalize() if info.mean else torch.nn.Identity(), torch_network(name, torch, info.num_classes)
    )
    export_torch(variables, name, tmp_path / "ours.pth.tar", epoch=90)
    saved = torch.load(tmp_path / "ours.pth.tar", weights_only=True)
    assert (saved["arch"], saved["epoch"]) == (ARCHITECTURES[name], 90)
    network.load_state_dict(saved["state_dict"], strict=True)
    network.eval()
    images = np.random.default_rng(1).uniform(size=(2, *info.image_shape)).astype(np.float32)
    with torch.no_grad():
        theirs = network.cpu()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert 0.3 < np.abs(theirs).max() < 30  # of order 1, as 1e-4 means nothing otherwise
    np.testing.assert_allclose(model.apply(variables, images), theirs, atol=1e-4, rtol=0)

    torch.save(
        {"arch": ARCHITECTURES[name], "epoch": 3, "state_dict": network.state_dict()}, tmp_path / "theirs.pth.tar"
    )
    read = read_torch_checkpoint(tmp_path / "theirs.pth.tar")
    assert (read.arch, read.epoch) == (ARCHITECTURES[name], 3)
    back = from_torch(read.tensors, name, dataset=DATASETS.get(name, "cifar10"))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@needs_torch
def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    import torch

    victim = tmp_path / "victim"

    class Malicious:
        def __reduce__(self):
            return (victim.write_text, ("executed",))

    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": Malicious()}, tmp_path / "bad.pth.tar")
    with pytest.raises(UserError, match=r"cannot be read as weights alone .*code in a checkpoint is never executed"):
        read_torch_checkpoint(tmp_path / "bad.pth.tar")
    assert not victim.exists()
    (tmp_path / "plain.pth.tar").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match=r"plain.pth.tar cannot be read|holds no state dictionary"):
        read_torch_checkpoint(tmp_path / "plain.pth.tar")
    with pytest.raises(UserError, match=r"nowhere.pth does not exist"):
        read_torch_checkpoint(tmp_path / "nowhere.pth")


@needs_torch
def test_tensors_of_every_kind_are_read_as_pytorch_reads_them_or_refused_in_a_line(tmp_path):
    import torch

    path, values = tmp_path / "a.pth", torch.arange(24.0).reshape(2, 3, 4)
    dense = {
        "transposed": values.permute(2, 0, 1),
        "a part": values[:, 1:, ::2],
        "expanded": values[:1].expand(5, 3, 4),
        "terabytes": torch.zeros(1).expand(10**12),
        "trained": values.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(values),
        "scalar": values.sum(),
        "empty": values[:0],
        **{name: values.to(getattr(torch, name)) for name in ("float64", "float16", "int64", "bool", "complex64")},
    }
    labelled = torch.nn.Parameter(values.clone())
    labelled.label = "a"
    dense["labelled"] = labelled
    for legacy in (False, True):
        torch.save(dense, path, _use_new_zipfile_serialization=not legacy)
        found = read_torch_checkpoint(path).tensors
        assert found.pop("terabytes").shape == (10**12,)
        for name, array in found.items():
            np.testing.assert_array_equal(array, dense[name].detach().numpy())
            assert array.dtype == dense[name].detach().numpy().dtype
    torch.save({"a": values.to(torch.bfloat16)}, path)
    assert read_torch_checkpoint(path).tensors["a"].dtype == jnp.bfloat16

    others = {
        "sparse": values.to_sparse(),
        "meta": values.to("meta"),
        "float8": values.to(torch.float8_e4m3fn),
        "negated": torch._neg_view(values),
        "conjugated": values.to(torch.complex64).conj(),
    }
    for legacy in (False, True):
        for value in others.values():
            torch.save({"a": value}, path, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(UserError, match=r"cannot be read as weights alone \(it (needs|has)") as caught:
                read_torch_checkpoint(path)
            assert str(caught.value).isprintable()


@needs_torch
def test_an_export_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            export_torch(make("lenet")[1], "lenet", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]
