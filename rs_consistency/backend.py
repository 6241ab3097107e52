"""What differs between backends: compiler options, each with its measured gain."""

import functools

import jax

# XLA's YNNPACK fusions make convolution gradients slow on the CPU: a LeNet step ran at 2,780 noisy images/s with
# them and 5,260 without (2 cores, 256 images). They help a forward pass alone, so only training turns them off.
_CPU_TRAINING = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def training_compiler_options(platform: str) -> dict[str, str] | None:
    """XLA options for a training step on a platform; None where the installed jaxlib does not know them."""
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_TRAINING).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _CPU_TRAINING
