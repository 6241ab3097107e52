"""Downloads a dataset and prepares it as array_record, which the programs read without TensorFlow.

    python -m rs_consistency.cli.prepare mnist [--data_dir=DIR] [--manual_dir=DIR]

Only this step needs TensorFlow (`pip install tensorflow-cpu`). It needs a network, unless the original files are in
`--manual_dir`.
"""

from collections.abc import Sequence

from rs_consistency.cli import start
from rs_consistency.cli.common import Parser, entry_point, user_place
from rs_consistency.common.errors import say


def _main(argv: Sequence[str]) -> None:
    # Slow to import, and `python -m` runs this module itself before the start.
    from rs_consistency.data.prepare import ORIGINALS, prepare

    parser = Parser(prog="python -m rs_consistency.cli.prepare", description=__doc__)
    parser.add_argument("name", help=", ".join(ORIGINALS))
    parser.add_argument(
        "--data_dir", type=user_place, help="folder to write to (default: $TFDS_DATA_DIR or TFDS's own)"
    )
    parser.add_argument("--manual_dir", type=user_place, help="a folder with the original files, instead of a download")
    args = parser.parse_args(argv)
    say(f"prepared {prepare(args.name, data_dir=args.data_dir or '', manual_dir=args.manual_dir or '')}")


main = entry_point(_main)


if __name__ == "__main__":
    start.prepare()
