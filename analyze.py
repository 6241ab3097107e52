"""Command line: `python analyze.py PATH...`; see `rs_consistency.cli.analyze`."""

from rs_consistency.cli.analyze import run

if __name__ == "__main__":
    run()
