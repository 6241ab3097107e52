"""Trains a classifier under noise; run again, it continues.

python train.py --config=configs/mnist.py --workdir=runs/mnist [--config.sigma=0.5 ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rs_consistency.cli.common import run_main
from rs_consistency.errors import UserError

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/mnist.py; --config.KEY=VALUE overrides a key.",
    lock_config=True, flag_values=_FLAGS,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, checkpoints.", flag_values=_FLAGS)
_HELP = flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=_FLAGS)


def _main(argv: Sequence[str] | None) -> None:
    _parse(sys.argv if argv is None else ["train.py", *argv])
    if _HELP.value:
        print(f"{__doc__}\nFlags:\n{_FLAGS.get_help()}\n\nconfigs/default.py names every key of a configuration.")
        return
    for name in ("config", "workdir"):
        if not _FLAGS[name].value:
            raise UserError(f"--{name} is missing: python train.py --config=configs/mnist.py --workdir=runs/mnist")
    # After the flags, so that a mistake in them is told at once.
    from rs_consistency.train_loop import train

    train(_CONFIG.value, Path(_WORKDIR.value).expanduser())


def _parse(argv: Sequence[str]) -> None:
    try:
        rest = _FLAGS(argv)[1:]
    except UserError:
        raise
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        ImportError,
        SyntaxError,
    ) as error:
        # Flag values, unknown keys, and config files that are missing or broken.
        raise UserError(f"{error}; configs/default.py names every key") from error
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; flags are written --name=value")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, argv)
