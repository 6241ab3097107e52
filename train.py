"""Command line: `python train.py --config=configs/mnist.py --workdir=DIR`; see `rs_consistency.cli.train`."""

from rs_consistency.cli.start import train

if __name__ == "__main__":
    train()
