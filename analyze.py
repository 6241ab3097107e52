"""Command line: `python analyze.py PATH...`; see `rs_consistency.cli.analyze`."""

from rs_consistency.cli.analyze import main
from rs_consistency.cli.common import run_program

if __name__ == "__main__":
    run_program(main)
