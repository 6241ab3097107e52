"""Command line: `python analyze.py PATH...`; see `rs_consistency.cli.analyze`."""

from rs_consistency.cli.analyze import main

if __name__ == "__main__":
    main()
