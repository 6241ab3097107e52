"""Command line: `python certify.py --workdir=DIR`; see `rs_consistency.cli.certify`."""

from rs_consistency.cli.certify import main
from rs_consistency.cli.common import run_program

if __name__ == "__main__":
    run_program(main)
