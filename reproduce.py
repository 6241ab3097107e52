"""Command line: `python reproduce.py --table=mnist --workdir=DIR`; see `rs_consistency.cli.reproduce`."""

from rs_consistency.cli.start import reproduce

if __name__ == "__main__":
    reproduce()
