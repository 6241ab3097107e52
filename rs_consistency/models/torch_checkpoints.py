"""Checkpoints of the published PyTorch repositories, read into this library's models and written from them.

The published training scripts save `{"arch": ..., "epoch": ..., "state_dict": ...}`, where the state dictionary is that
of `Sequential(layer, model)`, so that names begin with `1.`; ImageNet's model is in a `DataParallel` (`1.module.`). The
layer in front is not in the file: with most repositories it normalizes, subtracts mean and divides by standard
deviation; with the first release of Salman et al. (NeurIPS 2019) it subtracts the mean alone. See `INPUT_LAYERS`.
Names and shapes of the models are those of Cohen et al. (ICML 2019) and Jeong and Shin (NeurIPS 2020): LeNet, ResNet-20
and ResNet-110, DenseNet-40, and torchvision's ResNet-50. Only reading and writing the files needs PyTorch.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import data, models
from rs_consistency.common.checks import one_of
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import replace_atomically

# Name here -> `arch` of the published checkpoints.
ARCHITECTURES = {
    "lenet": "lenet",
    "resnet20": "cifar_resnet20",
    "resnet110": "cifar_resnet110",
    "densenet40": "cifar_densenet40",
    "resnet50": "resnet50",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LENET = {"Conv_0": "conv1", "Conv_1": "conv2", "Dense_0": "fc1", "Dense_1": "fc2"}
_IGNORED = "num_batches_tracked"  # of PyTorch's batch norm; nothing depends on it at a fixed momentum
_NORMALIZATION = {"means": "mean", "sds": "std"}  # of the layer in front, where it saved them

# What stands in front of the model -> which of these it has.
INPUT_LAYERS = {"normalize": ("means", "sds"), "center": ("means",), "none": ()}
_TOLERANCE = 1e-4


class TorchCheckpoint(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
      arch: as the file names it; empty where it does not.
      epoch: likewise; None.
      tensors: name -> array, as in the file.
    """

    arch: str
    epoch: int | None
    tensors: dict[str, np.ndarray]


def read_torch_checkpoint(path: Path) -> TorchCheckpoint:
    """Reads a checkpoint file with weights only: nothing that is pickled in it is executed.

    Raises:
      UserError: without PyTorch, or for a file that is not there, is damaged, or holds anything but data.
    """
    torch = _torch()
    if not path.is_file():
        raise UserError(f"torch_checkpoint={path} does not exist; give a file such as checkpoint.pth.tar")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds: pickle's, zip's, torch's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"torch_checkpoint={path} cannot be read as weights alone ({reason}); code in a checkpoint is never"
            " executed: save its state_dict by itself and give that"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"torch_checkpoint={path} holds no state dictionary; give a file of the published train.py")
    tensors = {name: value.detach().to(torch.float32).numpy() for name, value in state.items()}
    about = content if "state_dict" in content else {}
    epoch = about.get("epoch")
    return TorchCheckpoint(str(about.get("arch", "")), epoch if isinstance(epoch, int) else None, tensors)


def from_torch(
    tensors: Mapping[str, np.ndarray],
    model: str,
    *,
    dataset: str,
    input_layer: str = "normalize",
    name: str = "torch_checkpoint",
) -> dict[str, Any]:
    """The variables of a model of this library from a published state dictionary.

    Args:
      tensors: name -> array; `1.`, `module.` and `1.module.` in front of all names are left out.
      model: a key of `ARCHITECTURES`.
      dataset: whose image shape, classes and normalization the model has.
      input_layer: a key of `INPUT_LAYERS`: what stood in front of the model when it was trained. Where the file has
        its numbers (`0.means`, `0.sds`), they are checked. The variables are those for `with_input_layer(...)`.
      name: what to call the dictionary in an error.

    Returns:
      `params`, and `batch_stats` where the model has them, float32.

    Raises:
      UserError: naming the first tensor that is missing, unexpected, not finite or of another shape, or a normalization
        that is not the one inside the model here.
    """
    info = data.dataset_info(dataset)
    one_of("torch_input", input_layer, INPUT_LAYERS)
    strange = [key for key in tensors if not isinstance(key, str)]
    if strange:
        raise UserError(f"{name} has the key {strange[0]!r}, which is no name of a tensor; give a state dictionary")
    given, normalization = _without_prefixes(tensors, name)
    if normalization and set(normalization) != set(INPUT_LAYERS[input_layer]):
        fitting = next((how for how, keys in INPUT_LAYERS.items() if set(keys) == set(normalization)), "normalize")
        raise UserError(
            f"{name}: the layer in front of the model has {', '.join(sorted(normalization))}, which does not fit"
            f" torch_input={input_layer}; add --torch_input={fitting}"
        )
    for key, values in normalization.items():
        ours = getattr(info, _NORMALIZATION[key])
        theirs = tuple(float(value) for value in values.ravel())
        if len(ours) != len(theirs) or not np.allclose(ours, theirs, atol=_TOLERANCE):
            raise UserError(f"{name}: normalization {key}={theirs} is not that of {dataset}, {ours}; use its dataset")
    template = _template(model, dataset)
    found = {}
    for path, shape in template.items():
        place = _place(model, path)
        if place.name not in given:
            raise UserError(
                f"{name} has no {place.name}, which {model} needs; it has {', '.join(sorted(given)[:3])}, ...: is it of"
                " another model? (--config.model)"
            )
        wanted = place.to_torch(np.broadcast_to(np.float32(0), shape)).shape
        array = given.pop(place.name)
        if array.shape != wanted:
            raise UserError(
                f"{name}: {place.name} has shape {array.shape}, {model} for {dataset} needs {wanted}; use the model and"
                " the dataset that it was trained with"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{name}: {place.name} is not finite; give another checkpoint")
        found[path] = jnp.asarray(place.from_torch(np.asarray(array, np.float32)).reshape(shape))
    if given:
        raise UserError(f"{name}: {min(given)} is unknown to {model}; is it of another model? (--config.model)")
    return _nested(found)


def with_input_layer(network: Any, input_layer: str) -> Any:
    """A model whose normalization is another layer of `INPUT_LAYERS`: `center` divides by 1, `none` does nothing.

    Args:
      network: from `models.create_model`, with the mean and standard deviation of its dataset.
      input_layer: a key of `INPUT_LAYERS`.

    Raises:
      UserError: where there is no mean to subtract.
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
    """The published names and layouts of a model's variables: the inverse of `from_torch`, with its prefixes.

    Args:
      variables: `params`, and `batch_stats` where the model has them.
      model: a key of `ARCHITECTURES`.

    Returns:
      name -> float32 array (`num_batches_tracked`: int64), as `load_state_dict` of the published model takes it.

    Raises:
      UserError: for a model without a published PyTorch counterpart.
    """
    _check_model(model)
    prefix = "1.module." if model == "resnet50" else "1."
    found: dict[str, np.ndarray] = {}
    for path, leaf in _flat(variables).items():
        place = _place(model, path)
        found[prefix + place.name] = np.ascontiguousarray(place.to_torch(np.asarray(leaf, np.float32)))
        if place.name.endswith("running_var"):
            found[prefix + place.name.replace("running_var", _IGNORED)] = np.asarray(0, np.int64)
    return found


def export_torch(variables: Mapping[str, Any], model: str, path: Path, *, epoch: int = 0) -> None:
    """Writes a checkpoint that the published PyTorch code loads; replaces a file that is there.

    Args:
      variables: `params`, and `batch_stats` where the model has them.
      model: a key of `ARCHITECTURES`.
      path: of the file, such as checkpoint.pth.tar.
      epoch: finished epochs, for its record.

    Raises:
      UserError: without PyTorch, or for a model without a published counterpart.
    """
    torch = _torch()
    state = {name: torch.from_numpy(np.array(value)) for name, value in to_torch(variables, model).items()}
    with replace_atomically(path) as temporary:
        torch.save({"arch": ARCHITECTURES[model], "epoch": epoch, "state_dict": state}, temporary)


class _Place(NamedTuple):
    """Where a leaf is in a state dictionary, and how its layout changes."""

    name: str
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def _place(model: str, path: tuple[str, ...]) -> _Place:
    """Of a leaf such as ("params", "layer1_0", "conv1", "kernel")."""
    *modules, leaf = path[1:]
    if model == "lenet":
        modules = [_LENET[modules[0]]]
    elif model == "densenet40":
        modules = _densenet_modules(modules)
    else:
        modules = [re.sub(r"^(layer\d+|downsample)_(\d+)$", r"\1.\2", module) for module in modules]
    name = ".".join([*modules, _LEAVES[leaf]])
    if leaf != "kernel":
        return _Place(name, _same, _same)
    if model == "lenet" and modules == ["fc1"]:
        return _Place(name, _dense_after_convolution, _dense_after_convolution_back)
    return _Place(name, _kernel_to_torch, _kernel_from_torch)


def _densenet_modules(modules: list[str]) -> list[str]:
    outer = {"conv1": ["features", "conv0"], "bn": ["features", "norm_last"], "fc": ["classifier"]}
    if len(modules) == 1:
        return outer[modules[0]]
    block, layer = re.fullmatch(r"dense(\d+)_(\d+)", modules[0]).groups()
    kind, number = modules[1][:-1], modules[1][-1]
    part = {"bn": "norm", "conv": "conv"}[kind]
    return ["features", f"block{block}", f"layer{int(layer) + 1}", f"brc_{number}", part]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _kernel_to_torch(array: np.ndarray) -> np.ndarray:
    """`[H, W, I, O]` to `[O, I, H, W]`, or `[I, O]` to `[O, I]`."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _kernel_from_torch(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


_LENET_CHANNELS = 50  # in front of its first dense layer


def _dense_after_convolution(array: np.ndarray) -> np.ndarray:
    """`[H*W*C, O]` to `[O, C*H*W]`: flax flattens channels last, PyTorch channels first."""
    inputs, outputs = array.shape
    return (
        array.reshape(inputs // _LENET_CHANNELS, _LENET_CHANNELS, outputs).transpose(2, 1, 0).reshape(outputs, inputs)
    )


def _dense_after_convolution_back(array: np.ndarray) -> np.ndarray:
    outputs, inputs = array.shape
    return (
        array.reshape(outputs, _LENET_CHANNELS, inputs // _LENET_CHANNELS).transpose(2, 1, 0).reshape(inputs, outputs)
    )


def _without_prefixes(
    tensors: Mapping[str, np.ndarray], origin: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The model's tensors, and those of the normalization in front of it."""
    given, normalization = dict(tensors), {}
    for _ in range(3):  # DataParallel around, Sequential, DataParallel inside
        if given and all(name.startswith("module.") for name in given):
            given = {name.removeprefix("module."): value for name, value in given.items()}
        elif given and all(name.startswith(("0.", "1.")) for name in given):
            in_front = {name[2:]: value for name, value in given.items() if name.startswith("0.")}
            unknown = sorted(in_front.keys() - _NORMALIZATION.keys())
            if unknown:  # taken as the model's, it would silently stand for a tensor of the same name under `1.`
                raise UserError(
                    f"{origin} has 0.{unknown[0]}: what stands in front of the model is no layer with"
                    f" {' and '.join(_NORMALIZATION)}; save the model's own state_dict by itself and give that"
                )
            normalization |= in_front
            given = {name[2:]: value for name, value in given.items() if name.startswith("1.")}
    return {name: value for name, value in given.items() if not name.endswith(_IGNORED)}, normalization


def _template(model: str, dataset: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every leaf of a model's variables."""
    _check_model(model)
    info = data.dataset_info(dataset)
    network = models.create_model(model, num_classes=info.num_classes, mean=info.mean, std=info.std)
    images = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    try:
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"model={model!r} cannot take the images of {dataset} ({error}); use another") from None
    return {path: leaf.shape for path, leaf in _flat(variables).items()}


def _check_model(model: str) -> None:
    if model not in ARCHITECTURES:
        raise UserError(f"model={model!r} has no published PyTorch counterpart; use one of {', '.join(ARCHITECTURES)}")


def _flat(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree.leaves_with_path(dict(variables))
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, leaf in flat.items():
        inner = found
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return found


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed; pip install torch, or with this package: pip install 'rs-consistency[torch]' (in"
            " a clone: pip install '.[torch]')"
        ) from None
    return torch
