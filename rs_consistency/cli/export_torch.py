"""Writes a run's network as a checkpoint that the published PyTorch code loads.

    python -m rs_consistency.cli.export_torch --workdir=runs/mnist --output=checkpoint.pth.tar

Installed, the program is rs-export-torch. Needs PyTorch: pip install 'rs-consistency[torch]', in a clone '.[torch]'.
"""

from collections.abc import Sequence

from rs_consistency.cli.common import Parser, entry_points, user_path
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json
from rs_consistency.devices.parallel import choose_devices
from rs_consistency.models.torch_checkpoints import export_torch
from rs_consistency.training import runs
from rs_consistency.training.inputs import step_sizes
from rs_consistency.training.runs import DATA_FILE


def _main(argv: Sequence[str]) -> None:
    parser = Parser(prog="rs-export-torch", description=__doc__)
    add = parser.add_argument
    add("--workdir", type=user_path, required=True, help="folder of a run of train.py")
    add("--output", type=user_path, required=True, help="the file to write, such as checkpoint.pth.tar")
    args = parser.parse_args(argv)
    workdir, output = args.workdir, args.output
    if not output.parent.is_dir():
        raise UserError(f"output={output}: its folder does not exist; create it, or choose another --output")
    run = runs.restore(workdir, choose_devices(1))
    examples = read_json(workdir / DATA_FILE).get("train_examples") if (workdir / DATA_FILE).exists() else None
    epoch = run.step // step_sizes(run.config, examples).steps if examples else 0
    export_torch(run.variables, run.config.model, output, epoch=epoch)
    print(f"{output}: {run.config.model} after {epoch} epochs")


main, run = entry_points(_main)


if __name__ == "__main__":
    run()
