"""The assumption that one function casts all votes: its record, and its test before a vote is used.

The guarantee is about a function f from a noisy image to a class. A compiled network is one only if the class of a
noisy image does not depend on its row in a batch, on the other rows, or on the program around the network. Nothing in
a network for inference mixes rows, but a kernel may add in another order elsewhere. So, for noise on the grid, a test
comes before a vote is used. It is a test, not a proof.

The last bits of the logits do depend on the number of rows in a batch. So the function is that of a recorded
program, and votes are counted again with the recorded number of rows.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.voter import Voter
from rs_consistency.statistics.samplers import GRID

_HOST_DEVICES = "--xla_force_host_platform_device_count"  # has no effect on a device's program


def program_of(
    voter: Voter, variables: Any, image_shape: tuple[int, ...], *, rows: int, devices: Sequence[jax.Device]
) -> dict[str, Any]:
    """Return the program of a network, for the record of its votes.

    Returns:
      `platform`; `rows_per_device`, the rows of a batch; `xla_flags`, from the environment; `compiler_options` of the
      votes; `network_sha256`, of the network as XLA gets it.
    """
    voter.check(variables, image_shape, rows, devices)
    noisy = jax.ShapeDtypeStruct((rows, *image_shape), jnp.int32 if voter.sampler == GRID else jnp.float32)
    # Shapes alone: where the variables are is no part of the network.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), variables)
    text = jax.jit(voter.logits).lower(shapes, noisy).as_text()
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_HOST_DEVICES)]
    return {
        "platform": devices[0].platform,
        "rows_per_device": rows,
        "xla_flags": " ".join(sorted(flags)),
        "compiler_options": voter.compiler_options(devices[0].platform) or {},
        "network_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def check_one_function(
    voter: Voter,
    variables: Any,
    images: np.ndarray,
    *,
    addresses: tuple[np.ndarray, np.ndarray, np.ndarray],
    draws: dict[str, Any],
    rows: int,
    device: jax.Device,
    group_of: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Raise a `UserError` unless a vote program counted what the network, compiled alone, gives for the same copies.

    The first batch is also given to the network with its rows moved by one, and with its last copy in every row: each
    copy must have the same logits, bit for bit.

    Args:
      voter: the network.
      variables: its variables.
      images: `[R, H, W, C]` uint8, the image of each row.
      addresses: `[R]` each, of the votes, as for `Voter.noisy`.
      draws: `key` and `scale`, as for `Voter.noisy`.
      rows: rows of a batch on a device.
      device: the device.
      group_of: `[R]`, the group in which the vote program counted each row; G for a row that it did not count.
      counts: `[G, K + 2]`, the program's counts of the G groups: by class, of NaN, and the sum of the checksums.
    """

    def on_batch(values: np.ndarray, first: int) -> np.ndarray:
        part = values[first : first + rows]
        return np.pad(part, [(0, rows - len(part)), *[(0, 0)] * (part.ndim - 1)], "edge")

    @jax.jit
    def copies(
        images: jax.Array, addresses: tuple[jax.Array, jax.Array, jax.Array], draws: dict[str, Any]
    ) -> jax.Array:
        return voter.noisy(images, addresses=addresses, **draws)

    @functools.partial(jax.jit, compiler_options=voter.compiler_options(device.platform))
    def alone(variables: Any, noisy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = voter.logits(variables, noisy)
        return logits, *voter.votes(logits)

    variables, draws = jax.device_put((variables, draws), device)
    expected = np.zeros((len(counts) + 1, counts.shape[1]), np.int32)
    for first in range(0, len(images), rows):
        addressed = tuple(on_batch(np.asarray(each, np.int32), first) for each in addresses)
        noisy = copies(on_batch(images, first), addressed, draws)
        logits, classes, checksums = map(np.asarray, alone(variables, noisy))
        if first == 0:
            for taken in (np.roll(np.arange(rows), 1), np.full(rows, rows - 1)):
                again = np.asarray(alone(variables, np.asarray(noisy)[taken])[0])
                if again.tobytes() != logits[taken].tobytes():
                    raise UserError(
                        "the model gives other logits for the same image in another row of a batch, or beside other"
                        " images: then its votes prove nothing; remove whatever depends on the batch, or use another"
                        " batch_size, or sampler='float'"
                    )
        groups = group_of[first : first + rows]
        np.add.at(expected, (groups, classes[: len(groups)]), 1)
        np.add.at(expected[:, -1], groups, checksums[: len(groups)])
    known = counts[:, voter.num_classes] == 0  # a group with NaN is refused, or thrown away
    if not np.array_equal(counts[known], expected[:-1][known]):
        raise UserError(
            "the model gives other logits inside the compiled votes than by itself, for the same images: then its"
            " votes prove nothing; use another batch_size, or sampler='float'"
        )
