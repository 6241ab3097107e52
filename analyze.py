"""Command line: `python analyze.py PATH...`; see `rs_consistency.cli.analyze`."""

from rs_consistency.cli.start import analyze

if __name__ == "__main__":
    analyze()
