"""A trained model prepared for inference: everything that depends on its variables alone is computed once."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from rs_consistency.models import convolution
from rs_consistency.models.convolution import inference_convolution
from rs_consistency.models.layers import ImageClassifier

Path = tuple[str, ...]  # path of a layer in the model, such as ("layer1_0", "bn1")

AFFINE = "affine"  # collection of the variables that replace batch normalization


def for_inference(
    model: nn.Module, variables: Any, *, image_shape: Sequence[int]
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any]]:
    """Return the model in inference mode as a function with its own variables. Call it once, before many passes.

    - Batch normalization after an `nn.Conv` without bias is folded if nothing else uses the output of the convolution:
      the factors go into the kernel, and a shift, the bias of the convolution, is added in its place.
    - Any other batch normalization, and the input normalization of an `ImageClassifier`, becomes a multiplication and
      an addition.
    - An `nn.Conv` computes by `convolution.inference_convolution`.
    - Parameters of `nn.Conv` and `nn.Dense` are cast to the type that the layer computes in.

    The new numbers are computed in float64 and rounded once. Model, layers and types of the activations stay as in
    `model.apply`. A trace of the model shows which convolution a batch normalization follows, so a new model declares
    nothing.

    *Guarantee.* The logits equal `model.apply(variables, images, train=False)` up to rounding in the model's type. So a
    vote can differ only where the two largest logits differ by no more than this rounding.

    The model is any module of flax linen that takes `(images, train=False)`, for images of the shape `(H, W, C)`. Its
    variables are not changed. The new ones are `params`, without batch normalization, and `affine`.

    Returns:
      `(apply_fn, variables)`: `apply_fn(variables, images [N, H, W, C])` returns logits `[N, K]`. It raises a
      ValueError for images of another shape or the original variables.

    Raises:
      ValueError: when batch statistics have another use than running averages in an `nn.BatchNorm` over the last axis,
        or when the model does not take the images.
    """
    image_shape = tuple(image_shape)
    ready = _transform(*_trace(model, variables, image_shape), variables)

    def apply_fn(variables: Any, images: jax.Array) -> jax.Array:
        if images.shape[1:] != image_shape:
            wanted = ", ".join(map(str, ("N", *image_shape)))
            raise ValueError(f"images of shape {images.shape} are not [{wanted}], what for_inference prepared for")
        with nn.intercept_methods(_replace):
            return model.apply(variables, images, train=False)

    return apply_fn, ready


def _replace(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Replace normalizations by multiply-adds, and convolutions by faster forms: a flax interceptor."""
    module, method = context.module, context.method_name
    if method == "normalize" and isinstance(module, ImageClassifier) and module.mean:
        mean, std = np.float64(module.mean), np.float64(module.std)
        return _multiply_add(args[0], jnp.asarray(1 / std, jnp.float32), jnp.asarray(-mean / std, jnp.float32))
    given = module.conv_general_dilated if type(module) is nn.Conv else None
    # A model's own convolution stays, unless it comes from this package.
    ours = given is None or getattr(given, "__module__", None) == convolution.__name__
    if method == "__call__" and type(module) is nn.Conv and ours and given is not inference_convolution:
        faster = module.clone(parent=None, conv_general_dilated=inference_convolution)
        return faster.apply({"params": module.variables["params"]}, *args, **kwargs)
    if method == "__call__" and type(module) is nn.BatchNorm:
        if not module.has_variable(AFFINE, "shift"):
            raise ValueError(f"no {AFFINE}/{'/'.join(module.path)} in the variables; use those of for_inference")
        x, _ = _batch_norm_arguments(*args, **kwargs)
        y = _multiply_add(x, module.get_variable(AFFINE, "scale"), module.get_variable(AFFINE, "shift"))
        return y if module.dtype is None else y.astype(module.dtype)
    return next_fun(*args, **kwargs)


def _multiply_add(x: jax.Array, scale: jax.Array | None, shift: jax.Array) -> jax.Array:
    """Return `x * scale + shift` for each channel of the last axis, in float32 or a wider type."""
    if scale is not None:
        x = x * jnp.expand_dims(scale, range(x.ndim - 1))
    return x + jnp.expand_dims(shift, range(x.ndim - 1))


def _batch_norm_arguments(
    x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
) -> tuple[jax.Array, bool | None]:
    del mask  # used for batch statistics alone
    return x, use_running_average


def _trace(
    model: nn.Module, variables: Any, image_shape: tuple[int, ...]
) -> tuple[dict[Path, list[nn.Module]], dict[Path, Path]]:
    """Return the layers that a model calls for an image, and which batch normalizations can be folded.

    The layers are path -> the `nn.BatchNorm`, `nn.Conv` or `nn.Dense` there, for each of its calls; the folds are path
    of a batch normalization -> path of its convolution. The model runs abstractly, with a tag on every input of a batch
    normalization and output of a convolution.
    """
    layers: dict[Path, list[nn.Module]] = defaultdict(list)
    tags: dict[str, nn.Module] = {}

    def tagged(x: jax.Array, module: nn.Module) -> jax.Array:
        tag = f"for_inference {len(tags)}"
        tags[tag] = module
        return checkpoint_name(x, tag)  # the identity, but visible in the jaxpr

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        # A subclass may compute anything: it stays, and if it has batch statistics, `_transform` raises.
        if context.method_name != "__call__" or type(module) not in (nn.BatchNorm, nn.Conv, nn.Dense):
            return next_fun(*args, **kwargs)
        layers[module.path].append(module)
        if type(module) is not nn.BatchNorm:
            return tagged(next_fun(*args, **kwargs), module)
        x, running = _batch_norm_arguments(*args, **kwargs)
        if not nn.merge_param("use_running_average", module.use_running_average, running):
            raise ValueError(f"batch norm {'/'.join(module.path)} does not use its running averages with train=False")
        if module.axis not in (-1, x.ndim - 1):
            raise ValueError(f"batch norm {'/'.join(module.path)} has axis={module.axis}, only the last one works")
        return next_fun(tagged(x, module), running)

    with nn.intercept_methods(interceptor):
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda *args: model.apply(*args, train=False))(variables, images).jaxpr

    users = defaultdict(list)  # variable -> the modules that it is tagged for, and None for any other use
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            users[id(variable)].append(tags.get(equation.params.get("name")))
    for variable in jaxpr.outvars:
        users[id(variable)].append(None)

    folds = {}
    for equation in jaxpr.eqns:
        conv, used_by = tags.get(equation.params.get("name")), users[id(equation.outvars[0])]
        if type(conv) is nn.Conv and not conv.use_bias and [type(user) for user in used_by] == [nn.BatchNorm]:
            norm = used_by[0]
            if len(layers[conv.path]) == len(layers[norm.path]) == 1:  # shared layers cannot be folded separately
                folds[norm.path] = conv.path
    return layers, folds


def _transform(layers: dict[Path, list[nn.Module]], folds: dict[Path, Path], variables: Any) -> dict[str, Any]:
    """Return the variables of `for_inference`."""
    params, stats = (flatten_dict(variables.get(name, {})) for name in ("params", "batch_stats"))
    affine, factors = {}, {}
    starts = {"scale": 1.0, "bias": 0.0}  # for a batch normalization without these parameters
    for path, (layer, *_) in layers.items():
        if type(layer) is nn.BatchNorm:
            mean, var = (np.asarray(stats.pop((*path, name)), np.float64) for name in ("mean", "var"))
            scale, bias = (np.asarray(params.pop((*path, name), start), np.float64) for name, start in starts.items())
            factor = scale / np.sqrt(var + layer.epsilon)
            affine[*path, "shift"] = jnp.asarray(bias - mean * factor, jnp.float32)
            if path in folds:
                factors[folds[path]] = factor
            else:
                affine[*path, "scale"] = jnp.asarray(factor, jnp.float32)
    if stats:
        raise ValueError(
            f"batch statistics {'/'.join(next(iter(stats)))} belong to no nn.BatchNorm that the model calls"
        )

    for path, (layer, *_) in layers.items():
        for name in ("kernel", "bias"):
            value = params.get((*path, name))
            if value is None:
                continue
            dtype = layer.dtype or value.dtype
            if name == "kernel" and path in factors:
                value = np.asarray(value, np.float64) * factors[path]  # [..., C, F] * [F]
            params[*path, name] = jnp.asarray(value, dtype)
    others = {name: value for name, value in variables.items() if name not in ("params", "batch_stats")}
    return {**others, "params": unflatten_dict(params), AFFINE: unflatten_dict(affine)}
