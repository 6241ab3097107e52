"""Trains a classifier under noise; run again, it continues.

python train.py --config=configs/mnist.py --workdir=runs/mnist [--config.sigma=0.5 ...]

Installed, the program is rs-train; `configs/mnist.py` is then the project's where the current folder has none.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from rs_consistency.cli.common import entry_points, program_words
from rs_consistency.cli.config_file import resolve
from rs_consistency.common.errors import UserError


def _example() -> str:
    return " ".join([*program_words("train"), "--config=configs/mnist.py", "--workdir=runs/mnist"])


def _main(argv: Sequence[str]) -> None:
    values = parse(argv)
    if values.help:
        print(f"{__doc__}\nFlags:\n{values.get_help()}\n\nconfigs/default.py names every key of a configuration.")
        return
    if not values.workdir:
        raise UserError(f"--workdir is missing: {_example()}")
    if values.dry_run and values.profile is not None:
        raise UserError(f"profile={values.profile} writes a trace, and dry_run is to write nothing; leave out one")
    # Imported after the flags are parsed, so that a mistake in them is reported at once.
    from rs_consistency.training.dry_run import plan
    from rs_consistency.training.loop import train
    from rs_consistency.training.profiling import profile

    set_up(values.config)
    workdir = Path(values.workdir).expanduser()
    if values.dry_run:
        print(plan(values.config, workdir).text)
    elif values.profile is not None:
        print(profile(values.config, workdir, num_steps=values.profile))
    else:
        train(values.config, workdir)


def set_up(config: ConfigDict) -> None:
    """Set up JAX for training, before its first computation."""
    from rs_consistency.devices.host import CPU_DEVICES, check_compiled, fix_number_types, keep_memory, use_cores
    from rs_consistency.training.config import validate

    fix_number_types()
    check_compiled()
    with contextlib.suppress(UserError):  # two devices cannot share the step equally; `train` reports other errors
        validate(config, num_devices=CPU_DEVICES)
        use_cores()
    keep_memory()


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Return the flags of a command line; raise a `UserError` for a mistake in them."""
    if not any(arg.lstrip("-").split("=")[0] in ("config", "help", "h") for arg in argv):
        raise UserError(f"--config is missing: {_example()}")
    argv = resolve(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, such as configs/mnist.py; --config.KEY=VALUE overrides a key.",
        lock_config=True,
        sys_argv=["train.py", *argv],
        flag_values=values,
    )
    flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, checkpoints.", flag_values=values)
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Print plan, shapes, parameters, memory and a measured estimate of the time; write nothing but caches.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "profile",
        None,
        "Trace so many steps for TensorBoard and xprof, print the time of a step, and train nothing.",
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    try:
        rest = values(["train.py", *argv])[1:]
        if values["config"].value is not None:
            _ = values.config.items  # raises when the file could not be read
    except Exception as error:  # wrong values, unknown keys, and config files that are missing or broken
        raise _explain(error) from error
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; flags are written --name=value")
    return values


def _explain(error: Exception) -> UserError:
    """Return an error of absl or ml_collections as one line; an error in a config file is a traceback's text there."""
    if isinstance(error, AttributeError | KeyError):
        key = str(error.args[0]).replace("\\n", " ").replace("\\", "").replace("'", "").strip('"')
        return UserError(f"--config has no such key: {key}; configs/default.py names every key")
    if "get_config() takes 0 positional arguments" in str(error):
        return UserError("--config: this file has no published cells; leave out what follows the colon")
    last_line = str(error).strip().splitlines()[-1].strip()
    own = f"{UserError.__module__}.UserError: "
    if isinstance(error, flags.Error | UserError) or last_line.startswith(own):
        return UserError(last_line.removeprefix(own))
    return UserError(f"--config cannot be read: {last_line}; give a file such as configs/mnist.py")


main, run = entry_points(_main)
