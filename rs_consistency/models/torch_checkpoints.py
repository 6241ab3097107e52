"""Checkpoints of the published PyTorch repositories, read into this library's models and written from them.

The published training scripts save `{"arch": ..., "epoch": ..., "state_dict": ...}`. The state dictionary belongs to
`Sequential(layer, model)`, so names begin with `1.`, and with `1.module.` for ImageNet, whose model is in a
`DataParallel`. The layer in front is usually not in the file. Most repositories subtract the mean and divide by the
standard deviation there; the first release of Salman et al. (NeurIPS 2019) subtracts the mean alone: `INPUT_LAYERS`.
Names and shapes are from Cohen et al. (ICML 2019) and Jeong and Shin (NeurIPS 2020): LeNet, ResNet-20 and ResNet-110,
DenseNet-40, and torchvision's ResNet-50. Only writing the files needs PyTorch.
"""

import functools
import io
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rs_consistency import data, models
from rs_consistency.common.checks import MOST, count, one_of
from rs_consistency.common.errors import UserError, first_line
from rs_consistency.common.files import check_output, replace_atomically
from rs_consistency.models.torch_files import StoredTensor, read_torch_file

# Model -> `arch` of the published checkpoints.
ARCHITECTURES = {
    "lenet": "lenet",
    "resnet20": "cifar_resnet20",
    "resnet110": "cifar_resnet110",
    "densenet40": "cifar_densenet40",
    "resnet50": "resnet50",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LENET = {"Conv_0": "conv1", "Conv_1": "conv2", "Dense_0": "fc1", "Dense_1": "fc2"}
_LENET_CHANNELS = 50  # in front of its first dense layer
_FLOATS = [np.dtype(dtype) for dtype in (np.float32, np.float64, np.float16, jnp.bfloat16)]  # of parameters
_KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}  # [I, O] to [O, I], [H, W, I, O] to [O, I, H, W]
_IGNORED = "num_batches_tracked"  # in PyTorch's batch norm; nothing depends on it at a fixed momentum
_NORMALIZATION = {"means": "mean", "sds": "std"}  # tensor of the layer in front -> field of `DatasetInfo`

# Layer in front of the model -> its tensors.
INPUT_LAYERS = {"normalize": ("means", "sds"), "center": ("means",), "none": ()}


class TorchCheckpoint(NamedTuple):
    """The content of a checkpoint file.

    Attributes:
      arch: architecture; empty if the file does not name it.
      epoch: finished epochs; None if the file does not say.
      tensors: name -> array, as in the file.
    """

    arch: str
    epoch: int | None
    tensors: dict[str, np.ndarray]


def read_torch_checkpoint(path: Path) -> TorchCheckpoint:
    """Read a checkpoint file. Nothing in it is executed, and memory is bounded by its size.

    Raises:
      UserError: for a file that is missing, damaged, or holds more than plain data and dense tensors.
    """
    try:
        path = Path(path)
        if not path.is_file():
            problem = "is no file" if path.exists() else "does not exist"
            raise UserError(f"torch_checkpoint={path} {problem}; give a file such as checkpoint.pth.tar")
        content, array = read_torch_file(path)
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, StoredTensor) for name, value in state.items()
        ):
            raise UserError(f"torch_checkpoint={path} holds no state dictionary; give a file of the published train.py")
        tensors = {name: array(value) for name, value in state.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"torch_checkpoint={path} cannot be read: {error.strerror}; give a readable file") from None
    except Exception as error:  # many kinds: zip's, pickle's, our own
        raise UserError(
            f"torch_checkpoint={path} cannot be read as weights alone ({first_line(error)[:200]}); code in a checkpoint"
            " is never executed: save its state_dict by itself and give that"
        ) from None
    header = content if "state_dict" in content else {}
    arch, epoch = header.get("arch") or "", header.get("epoch")
    if not _is_name(arch):
        problem = "an arch that is no name"
    elif not (epoch is None or (type(epoch) is int and 0 <= epoch <= MOST)):
        problem = "an epoch that is no count"
    else:
        return TorchCheckpoint(arch, epoch, tensors)
    raise UserError(f"torch_checkpoint={path} has {problem}; save its state_dict by itself and give that")


def from_torch(
    tensors: Mapping[str, np.ndarray],
    model: str,
    *,
    dataset: str,
    input_layer: str = "normalize",
    name: str = "torch_checkpoint",
) -> dict[str, Any]:
    """Return the variables of a model of this library from a published state dictionary.

    Args:
      tensors: name -> array; `1.`, `module.` and `1.module.` in front of all names are left out.
      model: a key of `ARCHITECTURES`.
      dataset: name of the dataset with the model's image shape, classes and normalization.
      input_layer: a key of `INPUT_LAYERS`: the layer in front of the model during training. If the file has its numbers
        (`0.means`, `0.sds`), they are checked. The variables fit `with_input_layer(...)`.
      name: name of the dictionary in errors.

    Returns:
      `params`, and `batch_stats` if the model has them, float32.

    Raises:
      UserError: for a tensor that is missing, unexpected, not finite, of another shape or no floating-point numbers
        (float16, bfloat16, float32 or float64), with its name, or for another normalization than the model's here.
    """
    _check_model(model)
    info = data.dataset_info(dataset)
    one_of("torch_input", input_layer, INPUT_LAYERS)
    if not isinstance(tensors, Mapping):
        raise UserError(f"{name}={reprlib.repr(tensors)}: give a state dictionary, name -> array")
    strange = [key for key in tensors if not _is_name(key)]
    if strange:
        raise UserError(
            f"{name} has the key {reprlib.repr(strange[0])}, which is no name of a tensor; give a state dictionary"
        )
    given, normalization = _without_prefixes(tensors, name)
    if normalization and set(normalization) != set(INPUT_LAYERS[input_layer]):
        fitting = next((how for how, keys in INPUT_LAYERS.items() if set(keys) == set(normalization)), "normalize")
        raise UserError(
            f"{name}: the layer in front of the model has {', '.join(sorted(normalization))}, which does not fit"
            f" torch_input={input_layer}; add --torch_input={fitting}"
        )
    for key, values in normalization.items():
        ours = getattr(info, _NORMALIZATION[key])
        array = _floats(f"{name}: 0.{key}", values)
        theirs = tuple(array.ravel().tolist()) if array.size <= len(ours) else f"array of shape {array.shape}"
        if len(ours) != array.size or not np.allclose(ours, theirs, atol=1e-4):
            raise UserError(f"{name}: normalization {key}={theirs} is not that of {dataset}, {ours}; use its dataset")
    variables = {}
    for path, shape in _shapes(model, dataset).items():
        tensor = _counterpart(model, path, shape)
        if tensor.name not in given:
            raise UserError(
                f"{name} has no {tensor.name}, which {model} needs; it has {', '.join(sorted(given)[:3])}, ...: is it"
                " of another model? (--config.model)"
            )
        array = _floats(f"{name}: {tensor.name}", given.pop(tensor.name))
        if array.shape != tensor.shape:
            raise UserError(
                f"{name}: {tensor.name} has shape {array.shape}, {model} for {dataset} needs {tensor.shape}; use the"
                " model and the dataset that it was trained with"
            )
        variables[path] = jnp.asarray(tensor.from_torch(_finite(f"{name}: {tensor.name}", array)).reshape(shape))
    if given:
        raise UserError(f"{name}: {min(given)} is unknown to {model}; is it of another model? (--config.model)")
    return unflatten_dict(variables)


def with_input_layer(network: Any, input_layer: str) -> Any:
    """Return a model with another layer of `INPUT_LAYERS` as normalization: `center` divides by 1, `none` is no layer.

    Args:
      network: model of `models.create_model`, with the mean and standard deviation of its dataset.
      input_layer: a key of `INPUT_LAYERS`.

    Raises:
      UserError: for `center` without a mean to subtract.
    """
    one_of("torch_input", input_layer, INPUT_LAYERS)
    if input_layer == "none":
        return network.clone(mean=(), std=())
    if input_layer == "center":
        if not network.mean:
            raise UserError("torch_input=center: images of this dataset are not normalized; use none")
        return network.clone(std=(1.0,) * len(network.mean))
    return network


def to_torch(variables: Mapping[str, Any], model: str) -> dict[str, np.ndarray]:
    """Return a model's variables with the published names and layouts: the inverse of `from_torch`, with prefixes.

    Args:
      variables: `params`, and `batch_stats` if the model has them.
      model: a key of `ARCHITECTURES`.

    Returns:
      name -> float32 array (`num_batches_tracked`: int64), as `load_state_dict` of the published model takes it.

    Raises:
      UserError: for a model without a published PyTorch counterpart, or for variables that are missing, unknown, not
        finite, no floating-point numbers or of another number of axes, with their path.
    """
    _check_model(model)
    given = flatten_dict(dict(variables)) if isinstance(variables, Mapping) else {}
    expected = _shapes(model, "cifar10")  # whose paths and numbers of axes are those of every dataset
    for path in sorted(expected.keys() ^ given.keys(), key=str):
        shown = reprlib.repr("/".join(map(str, path)))
        raise UserError(
            f"variables {'lack' if path in expected else 'have the unknown'} {shown}; give `params` and `batch_stats`"
            f" of a {model}"
        )
    prefix = "1.module." if model == "resnet50" else "1."
    state: dict[str, np.ndarray] = {}
    for path, shape in sorted(expected.items()):
        name = f"variables: {'/'.join(path)}"
        array = _floats(name, given[path])
        of_flat_images = model == "lenet" and path[1:] == ("Dense_0", "kernel")
        if array.ndim != len(shape) or (of_flat_images and array.shape[0] % _LENET_CHANNELS):
            raise UserError(f"{name} has shape {array.shape}, which no {model} has; give the variables of a {model}")
        tensor = _counterpart(model, path, array.shape)
        state[prefix + tensor.name] = np.ascontiguousarray(tensor.to_torch(_finite(name, array)))
        if tensor.name.endswith("running_var"):
            state[prefix + tensor.name.replace("running_var", _IGNORED)] = np.asarray(0, np.int64)
    return state


def export_torch(variables: Mapping[str, Any], model: str, path: Path, *, epoch: int = 0) -> None:
    """Write a checkpoint that the published PyTorch code loads. An existing file is replaced.

    Args:
      variables: `params`, and `batch_stats` if the model has them.
      model: a key of `ARCHITECTURES`.
      path: path of the file, such as checkpoint.pth.tar.
      epoch: finished epochs, recorded in the file.

    Raises:
      UserError: as `to_torch`, without PyTorch, or for a path that is no file in a folder.
    """
    path, epoch = Path(path), count("epoch", epoch, at_least=0)
    check_output(path)
    state = to_torch(variables, model)
    torch = _torch()
    content = io.BytesIO()  # PyTorch's own writing into a file does not end in an `OSError` when the disk is full
    state = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    torch.save({"arch": ARCHITECTURES[model], "epoch": epoch, "state_dict": state}, content)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content.getbuffer())


class _Tensor(NamedTuple):
    """The counterpart of a variable in a state dictionary."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[int, ...]  # shape of the variable, with all axes apart that change places
    order: tuple[int, ...]  # for each axis of the tensor its number in `parts`

    def to_torch(self, variable: np.ndarray) -> np.ndarray:
        return variable.reshape(self.parts).transpose(self.order).reshape(self.shape)

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape([self.parts[axis] for axis in self.order]).transpose(np.argsort(self.order))


def _counterpart(model: str, path: tuple[str, ...], shape: tuple[int, ...]) -> _Tensor:
    """Return the tensor for a variable, such as ("params", "layer1_0", "conv1", "kernel")."""
    *modules, leaf = path[1:]
    if model == "lenet":
        module = _LENET[modules[0]]
    elif model == "densenet40":
        module = _densenet_module(*modules)
    else:
        module = re.sub(r"(layer\d+|downsample)_(\d+)", r"\1.\2", ".".join(modules))
    name = f"{module}.{_LEAVES[leaf]}"
    if name == "fc1.weight":  # LeNet flattens [H, W, C] here and [C, H, W] in PyTorch
        inputs, outputs = shape
        return _Tensor(name, (outputs, inputs), (inputs // _LENET_CHANNELS, _LENET_CHANNELS, outputs), (2, 1, 0))
    order = _KERNEL_AXES[len(shape)] if leaf == "kernel" else tuple(range(len(shape)))
    return _Tensor(name, tuple(shape[axis] for axis in order), shape, order)


def _densenet_module(outer: str, inner: str = "") -> str:
    if not inner:
        return {"conv1": "features.conv0", "bn": "features.norm_last", "fc": "classifier"}[outer]
    block, layer = re.fullmatch(r"dense(\d+)_(\d+)", outer).groups()
    kind, number = inner[:-1].replace("bn", "norm"), inner[-1]
    return f"features.block{block}.layer{int(layer) + 1}.brc_{number}.{kind}"


def _without_prefixes(
    tensors: Mapping[str, np.ndarray], origin: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the tensors of the model, and the tensors of the normalization in front of it."""
    given, normalization = dict(tensors), {}
    for _ in range(3):  # DataParallel around, Sequential, DataParallel inside
        if given and all(name.startswith("module.") for name in given):
            given = {name.removeprefix("module."): value for name, value in given.items()}
        elif given and all(name.startswith(("0.", "1.")) for name in given):
            in_front = {name[2:]: value for name, value in given.items() if name.startswith("0.")}
            unknown = sorted(in_front.keys() - _NORMALIZATION.keys())
            if unknown:  # without its prefix it could silently replace a tensor of the model
                raise UserError(
                    f"{origin} has 0.{unknown[0]}: what stands in front of the model is no layer with"
                    f" {' and '.join(_NORMALIZATION)}; save the model's own state_dict by itself and give that"
                )
            normalization |= in_front
            given = {name[2:]: value for name, value in given.items() if name.startswith("1.")}
    return {name: value for name, value in given.items() if not name.endswith(_IGNORED)}, normalization


def _is_name(value: Any) -> bool:
    """Return whether a value can be the name of a tensor or of an architecture: short, and safe to print."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{0,200}", value, re.ASCII) is not None


def _floats(name: str, value: Any) -> np.ndarray:
    """Return an array of floating-point numbers without a copy; nothing else can be a parameter."""
    try:
        array = np.asarray(value)
    except Exception:  # of NumPy for ragged lists, of others for what cannot become an array
        raise UserError(
            f"{name} is a {type(value).__name__}, which is no array of numbers; give an array of NumPy"
        ) from None
    if array.dtype not in _FLOATS:
        raise UserError(f"{name} is of the type {array.dtype}; give {', '.join(map(str, _FLOATS))}")
    return array


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """Return float32; the shape was checked before, so that a few bytes cannot become terabytes."""
    with np.errstate(over="ignore"):
        array = np.array(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{name} is not finite; give another checkpoint")
    return array


def _shapes(model: str, dataset: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of each of a model's variables, by its path."""
    info = data.dataset_info(dataset)
    try:
        return _shapes_for(model, info.num_classes, tuple(info.image_shape))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"model={model!r} cannot take the images of {dataset} ({error}); use another") from None


@functools.cache
def _shapes_for(model: str, num_classes: int, image_shape: tuple[int, ...]) -> dict[tuple[str, ...], tuple[int, ...]]:
    network = models.create_model(model, num_classes=num_classes)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in flatten_dict(variables).items()}


def _check_model(model: str) -> None:
    if not (isinstance(model, str) and model in ARCHITECTURES):
        raise UserError(f"model={model!r} has no published PyTorch counterpart; use one of {', '.join(ARCHITECTURES)}")


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed; pip install torch, or with this package: pip install 'rs-consistency[torch]' (in"
            " a clone: pip install '.[torch]')"
        ) from None
    return torch
