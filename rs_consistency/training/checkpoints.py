"""Checkpoints of a run, through Orbax: saved in the background, the newest k kept, damaged checkpoints stepped over."""

import errno
import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rs_consistency.common.errors import UserError, first_line, note
from rs_consistency.common.files import check_utf8

# Orbax drops coroutines where it fails on a damaged checkpoint; `restore_newest` tells of the damage in a line.
warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)

_DIGEST_BYTES = hashlib.sha256().digest_size


class Checkpoints:
    """The folder `checkpoints` of a workdir.

    A step is listed once it is whole: Orbax writes beside it and renames. Steps are tried from newest to oldest. A step
    is stepped over when it cannot be read (an empty folder, a truncated file), or when its content differs from the
    digest that was saved with it.
    """

    def __init__(self, workdir: Path, *, keep: int | None = None) -> None:
        """Opens the folder for reading, or, with a number of newest checkpoints to `keep`, for writing: it is made."""
        check_utf8(workdir, "workdir")
        self.folder = workdir.resolve() / "checkpoints"
        self._manager = None
        self._failed = False
        if keep is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_dir():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                read_only=keep is None,
                cleanup_tmp_directories=keep is not None,  # a kill in the middle of a save leaves them
            )
            # The handler is named: Orbax would otherwise look it up in the first step, which may be damaged.
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
            )

    def save(self, step: int, state: Any) -> None:
        """Start to save a copy of a state: the next step may donate the state's buffers meanwhile.

        Raise a `UserError` when this save or the save before failed, such as on a full disk.
        """
        saved = {"state": _fields(jax.tree.map(jnp.copy, state)), "digest": _digest_array(state)}
        self._guard(lambda: self._manager.save(step, args=ocp.args.StandardSave(saved)))

    def wait(self) -> None:
        """Return when the last save is on disk; raise like `save`."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait for the last save and end the background work; raise like `save`, but no failure twice."""
        if self._manager is not None:
            with suppress(UserError) if self._failed else nullcontext():
                self._guard(self._manager.close)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise many kinds, with many lines
            self._failed = True
            raise UserError(
                f"a checkpoint could not be written to {self.folder}: {_reason(error)}; free space or make it writable,"
                " then run the same command again: it continues after the newest whole checkpoint"
            ) from error

    def restore_newest(self, target: Any) -> tuple[int, Any] | None:
        """Return step and state of the newest readable checkpoint, or None if there is none at all.

        `target` is the state's structure, as `jax.ShapeDtypeStruct` with shardings. A note names every checkpoint that
        was stepped over. Raise a `UserError` when there are checkpoints and none can be read.
        """
        steps = sorted(self.steps(), reverse=True)
        saved_target = {"state": _fields(target), "digest": np.zeros(_DIGEST_BYTES, np.uint8)}
        for step in steps:
            try:
                saved = self._manager.restore(step, args=ocp.args.StandardRestore(saved_target))
                state = target.replace(**saved["state"])
                if not np.array_equal(saved["digest"], _digest_array(state)):
                    raise ValueError("its content is not what was saved")
                return step, state
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                note(f"checkpoint {self.folder / str(step)} is unreadable: {_reason(error)}; trying the one before")
        if steps:
            raise UserError(
                f"every checkpoint in {self.folder} is unreadable (steps {', '.join(map(str, steps))}); restore one"
                " from a copy, or train again in another --workdir"
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, readable or not."""
        return list(self._manager.all_steps()) if self._manager is not None else []

    def set_aside_after(self, step: int) -> None:
        """Move the checkpoints of later steps to `damaged_checkpoints`: these steps will be saved again."""
        for later in self._manager.all_steps():
            if later > step:
                aside = self.folder.parent / "damaged_checkpoints" / str(later)
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(later)).rename(aside)
        self._manager.reload()


def digest(tree: Any) -> str:
    """Return SHA-256 over names, shapes, types and values of all arrays of a tree, in hexadecimal digits."""
    sha = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    for path, leaf in sorted(leaves.items()):
        array = np.asarray(leaf)
        sha.update(f"{path} {array.dtype.str} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()


def _fields(state: Any) -> dict[str, Any]:
    """Return the fields of a state that are there. So a field that few runs have changes no checkpoint of others."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _digest_array(state: Any) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digest(state)), np.uint8)


# Errors of the disk. Another OSError, such as a missing file, may only be a consequence of the failure.
_DISK_ERRORS = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)


def _reason(error: Exception) -> str:
    """Return the operating system's message, where TensorStore quotes it, or else the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        quoted = re.search(r": ([^:]+) \[os_error_code", str(cause))
        if quoted:
            return quoted[1]
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error).split(" See full TensorStore details")[0][:160]
