"""Writes a run's network as a checkpoint that the published PyTorch code loads.

    python -m rs_consistency.cli.export_torch --workdir=runs/mnist --output=checkpoint.pth.tar

Installed, the program is rs-export-torch. Needs PyTorch: pip install 'rs-consistency[torch]', in a clone '.[torch]'.
"""

from collections.abc import Sequence

from rs_consistency.cli import start
from rs_consistency.cli.common import Parser, entry_point, user_path
from rs_consistency.common.errors import say
from rs_consistency.common.files import check_output


def _main(argv: Sequence[str]) -> None:
    parser = Parser(prog="rs-export-torch", description=__doc__)
    add = parser.add_argument
    add("--workdir", type=user_path, required=True, help="folder of a run of train.py")
    add("--output", type=user_path, required=True, help="the file to write, such as checkpoint.pth.tar")
    args = parser.parse_args(argv)
    workdir, output = args.workdir, args.output
    # Imported after the flags are parsed, and after the start: `python -m` runs this module itself.
    from rs_consistency.devices.parallel import choose_devices
    from rs_consistency.models.torch_checkpoints import export_torch
    from rs_consistency.training import runs

    check_output(output)
    run = runs.restore(workdir, choose_devices(1))
    last = runs.finished_step(workdir, run.config)
    epoch = run.step * run.config.num_epochs // last if last else 0
    export_torch(run.variables, run.config.model, output, epoch=epoch)
    say(f"{output}: {run.config.model} after {epoch} epochs")


main = entry_point(_main)


if __name__ == "__main__":
    start.export_torch()
