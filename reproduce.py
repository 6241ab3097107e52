"""Command line: `python reproduce.py --table=mnist --workdir=DIR`; see `rs_consistency.cli.reproduce`."""

from rs_consistency.cli.reproduce import run

if __name__ == "__main__":
    run()
