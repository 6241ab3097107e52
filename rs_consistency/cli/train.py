"""Trains a classifier under noise; run again, it continues.

python train.py --config=configs/mnist.py --workdir=runs/mnist [--config.sigma=0.5 ...]

Installed, the program is rs-train; `configs/mnist.py` is then the project's where the current folder has none.
"""

import contextlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from rs_consistency.cli.common import entry_point, note_repeated, program_words
from rs_consistency.cli.config_file import load, overridden_key, resolve
from rs_consistency.common.checks import no_such_key
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import local_path


def _example() -> str:
    return " ".join([*program_words("train"), "--config=configs/mnist.py", "--workdir=runs/mnist"])


def _main(argv: Sequence[str]) -> None:
    note_repeated(word for word in argv if "=" in word)
    values = parse(argv)
    if values.help:
        print(f"{__doc__}\nFlags:\n{values.get_help()}\n\nconfigs/default.py names every key of a configuration.")
        return
    if not values.workdir:
        raise UserError(f"--workdir is missing: {_example()}")
    if values.dry_run and values.profile is not None:
        raise UserError(f"profile={values.profile} writes a trace, and dry_run is to write nothing; leave out one")
    workdir = local_path(values.workdir, "workdir")
    # Imported after the flags are parsed, so that a mistake in them is reported at once.
    from rs_consistency.training.dry_run import plan
    from rs_consistency.training.loop import train
    from rs_consistency.training.profiling import profile

    set_up(values.config)
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
    """Return the flags of a command line; raise a `UserError` for a mistake in them or in the configuration."""
    if not any(arg.lstrip("-").split("=")[0] in ("config", "help", "h") for arg in argv):
        raise UserError(f"--config is missing: {_example()}")
    argv = resolve(argv)
    files = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    config = load(files[-1]) if files else ConfigDict()
    if files:
        _check(config, argv)
    argv = ["train.py", *(word for word in argv if not word.startswith("--config="))]
    try:
        values = _define(config, argv)
        rest = values(argv)[1:]
    except Exception as error:  # absl and ml_collections raise many kinds for a value that they cannot read
        raise UserError(str(error).strip().splitlines()[-1].strip()) from error
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; flags are written --name=value")
    if files:
        _check(values.config, argv)
    return values


def _define(config: ConfigDict, argv: Sequence[str]) -> flags.FlagValues:
    """Return the program's flags, without their values."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config",
        config,
        "Configuration file, such as configs/mnist.py; --config.KEY=VALUE overrides a key.",
        sys_argv=argv,
        flag_values=values,
    )
    values["config"].default_as_str = None  # else --help prints a whole configuration
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
    return values


def _check(config: ConfigDict, argv: Sequence[str]) -> None:
    """Raise a `UserError` for a configuration, or a key on the command line, that is not as in configs/default.py."""
    from rs_consistency.training.config import check_keys, flatten  # slow to import; --help needs none

    check_keys(config)
    known = flatten(config)
    blocks = {key.split(".")[0] for key in known}
    for key in map(overridden_key, argv):
        if key is not None and key not in known and key not in blocks:
            raise no_such_key(key, known)


main = entry_point(_main)
