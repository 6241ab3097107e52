"""Command line: `python certify.py --workdir=DIR`; see `rs_consistency.cli.certify`."""

from rs_consistency.cli.start import certify

if __name__ == "__main__":
    certify()
