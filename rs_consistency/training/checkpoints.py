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
_MOST_REPLACED = 100  # steps that vanish, or that newer ones follow, while they are read


class Checkpoints:
    """The folder `checkpoints` of a workdir.

    A step is listed once it is whole: Orbax writes beside it and renames. Steps are tried from newest to oldest. A step
    is stepped over when it cannot be read (an empty folder, a truncated file), when its content differs from the digest
    that was saved with it, or when its state is of another step. The run may be training meanwhile, in another process
    that removes old steps: the steps are listed again whenever one cannot be read.
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
            self._manager = _while_steps_vanish(
                lambda: ocp.CheckpointManager(
                    self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
                )
            )

    def save(self, step: int, state: Any) -> None:
        """Start to save a copy of a state: the next step may donate the state's buffers meanwhile.

        Raise a `UserError` when this save or the save before failed, such as on a full disk, and when the folder holds
        this step, or a later one, already.
        """
        saved = {"state": _fields(jax.tree.map(jnp.copy, state)), "digest": _digest_array(state)}
        if not self._guard(lambda: self._manager.save(step, args=ocp.args.StandardSave(saved))):
            raise UserError(
                f"checkpoint {step} was not written to {self.folder}: it holds steps {self.steps()} already; move the"
                " later steps away, then run the same command again"
            )

    def wait(self) -> None:
        """Return when the last save is on disk; raise like `save`."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait for the last save and end the background work; raise like `save`, but no failure twice."""
        if self._manager is not None:
            with suppress(UserError) if self._failed else nullcontext():
                self._guard(self._manager.close)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
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
        failed: set[int] = set()
        replaced = 0
        while untried := set(self.steps()) - failed:
            step, newest = max(untried), max(untried | failed)
            try:
                return step, self._restore(step, target)
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                failed.add(step)
                _while_steps_vanish(self._manager.reload)
                steps = self.steps()
                if step in steps and max(steps) <= newest:
                    note(f"checkpoint {self.folder / str(step)} is unreadable: {_reason(error)}; trying the one before")
                    continue
                replaced += 1  # by the run, which is training
                if replaced > _MOST_REPLACED:
                    raise UserError(
                        f"the checkpoints in {self.folder} are replaced before they are read; try again once the"
                        " training is over"
                    ) from None
        if failed := sorted(self.steps(), reverse=True):
            raise UserError(
                f"every checkpoint in {self.folder} is unreadable (steps {', '.join(map(str, failed))}); restore one"
                " from a copy, or train again in another --workdir"
            )
        return None

    def _restore(self, step: int, target: Any) -> Any:
        """Return the state of a step; raise an error where it is not the state that was saved for this step."""
        saved_target = {"state": _fields(target), "digest": np.zeros(_DIGEST_BYTES, np.uint8)}
        saved = self._manager.restore(step, args=ocp.args.StandardRestore(saved_target))
        state = target.replace(**saved["state"])
        if not np.array_equal(saved["digest"], _digest_array(state)):
            raise ValueError("its content is not what was saved")
        if int(state.step) != step:
            raise ValueError(f"its content is of step {int(state.step)}")
        return state

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, readable or not."""
        if self._manager is None:
            return []
        if not self._manager.all_steps():  # a listing may miss a step that replaces another one meanwhile
            _while_steps_vanish(self._manager.reload)
        return list(self._manager.all_steps())

    def set_aside_after(self, step: int) -> None:
        """Move the checkpoints of later steps to `damaged_checkpoints`: these steps will be saved again."""
        for later in self._manager.all_steps():
            if later > step:
                aside = self.folder.parent / "damaged_checkpoints" / str(later)
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(later)).rename(aside)
        self._manager.reload()


def _while_steps_vanish(listing: Callable[[], Any]) -> Any:
    """Return the result of a listing, again where a step vanished from the folder meanwhile."""
    for _ in range(_MOST_REPLACED):
        with suppress(FileNotFoundError):
            return listing()
    return listing()


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
