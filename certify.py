"""Command line: `python certify.py --workdir=DIR`; see `rs_consistency.cli.certify`."""

from rs_consistency.cli.certify import run

if __name__ == "__main__":
    run()
