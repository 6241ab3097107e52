"""Certifies the classifier of a run by randomized smoothing; run again, it continues.

    python certify.py --workdir=runs/mnist

For every image: the class that the smoothed classifier predicts, and an l2 radius within which, with probability
1 - alpha, no perturbation changes it. Writes certificates.tsv (a line per image) and certificates.json.
"""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from rs_consistency import data, parallel, runs, training, voting
from rs_consistency.certificates import CertificateFile
from rs_consistency.certification import conclude
from rs_consistency.checkpoints import digest
from rs_consistency.checks import probability, whole_number
from rs_consistency.cli.common import Parser, run_main, whole
from rs_consistency.errors import note
from rs_consistency.rows import CERTIFY, certify_rows
from rs_consistency.shards import Selection
from rs_consistency.version import code_version, package_version
from rs_consistency.workdir import finished_step

_SECONDS_BETWEEN_LINES = 30  # of the progress, where stderr is a file


def _parser() -> Parser:
    parser = Parser(prog="certify.py", description=__doc__)
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="folder of a run of train.py")
    add("--n0", type=whole, default=100, help="votes that choose the class (default: %(default)s)")
    add("--n", type=whole, default=100_000, help="further votes that measure it (default: %(default)s)")
    add("--alpha", type=float, default=0.001, help="error probability of a certificate (default: %(default)s)")
    add("--sigma", type=float, help="standard deviation of the noise (default: the one used in training)")
    add("--skip", type=whole, default=1, help="certify every SKIP-th image (default: %(default)s)")
    add("--max", type=whole, help="certify at most so many images (default: all)")
    add("--split", default="test", help="train or test (default: %(default)s)")
    add("--seed", type=whole, default=0, help="of the noise (default: %(default)s)")
    add("--batch_size", type=whole, help="noisy images at a time; no effect on the votes (default: by device)")
    add(
        "--num_devices",
        type=whole,
        default=0,
        help="devices that share the work; no effect on the votes (default: all)",
    )
    add("--data_dir", default="", help="folder of the prepared dataset (default: as in training)")
    add("--cache_dir", default="", help="folder of decoded images (default: as in training)")
    add("--output", type=Path, help="the file to write (default: WORKDIR/certificates.tsv)")
    return parser


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    workdir = args.workdir.expanduser()
    config = runs.read_valid_config(workdir)
    info = data.dataset_info(config.dataset.name)
    devices = parallel.choose_devices(args.num_devices)
    alpha = probability("alpha", args.alpha)
    settings = voting.vote_settings(
        sigma=config.sigma if args.sigma is None else args.sigma, num_classes=info.num_classes, n0=args.n0, n=args.n,
        seed=args.seed, batch_size=args.batch_size, image_shape=info.image_shape, platform=devices[0].platform,
    )  # fmt: skip
    skip = whole_number("skip", args.skip, at_least=1)
    most = None if args.max is None else whole_number("max", args.max, at_least=1)

    split = data.open_split(
        config.dataset.name,
        args.split,
        data_dir=args.data_dir or config.dataset.data_dir,
        cache_dir=args.cache_dir or config.dataset.cache_dir,
    )
    run = runs.restore(workdir, devices)
    last_step = finished_step(workdir, config)
    if last_step is not None and run.step < last_step:
        note(f"the training is not finished: step {run.step} of {last_step}; another checkpoint needs another --output")
    selection = Selection(len(split), skip, most)
    identity = {
        "sigma": settings.sigma, "n0": settings.n0, "n": settings.n, "alpha": alpha, "seed": settings.seed,
        "bound": "clopper_pearson", "dataset": config.dataset.name, "split": args.split, "data_digest": split.digest(),
        "model": config.model, "dtype": config.dtype, "checkpoint_step": run.step,
        "parameter_digest": digest(run.variables),
    }  # fmt: skip
    output = (args.output or workdir / "certificates.tsv").expanduser()
    about = _about(config, devices)
    file = CertificateFile(output, schema=CERTIFY, identity=identity, about=about, selection=selection)
    try:
        remaining = file.remaining
        images, labels = split.read(remaining)
        model = training.make_model(config)
        votes = voting.count_votes(
            lambda variables, images: model.apply(variables, images, train=False),
            run.variables,
            images,
            remaining,
            settings=settings,
            devices=devices,
        )
        _certify(file, votes, remaining, labels, alpha=alpha, sigma=settings.sigma)
        file.finish()
    finally:
        file.close()
    done = file.progress
    print(
        f"{output}: {done.images} images, ACR {done.acr:.4f},"
        f" accuracy {done.correct / done.images:.4f}, abstained {done.abstained}\n"
        f"next: python analyze.py {output}"
    )


def _certify(
    file: CertificateFile,
    groups: Iterator[voting.Votes],
    indices: np.ndarray,
    labels: np.ndarray,
    *,
    alpha: float,
    sigma: float,
) -> None:
    """Adds the images that the file does not hold yet, group by group."""
    done_before = file.progress.images
    if done_before:
        note(f"{file.path} holds {done_before} images already")
    bar = tqdm(
        total=done_before + len(indices), initial=done_before, desc="certifying", unit="img",
        mininterval=0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
    )  # fmt: skip
    with bar:
        before = time.perf_counter()
        for votes in groups:
            first = file.progress.images - done_before
            group = slice(first, first + len(votes.counts))
            result = conclude(*votes, alpha=alpha, sigma=sigma)
            now = time.perf_counter()
            file.append(certify_rows(indices[group], labels[group], result, (now - before) / len(votes.counts)))
            before = now
            bar.set_postfix(ACR=f"{file.progress.acr:.4f}", refresh=False)
            bar.update(len(votes.counts))


def _about(config: ConfigDict, devices: list[jax.Device]) -> dict[str, Any]:
    versions = {name: package_version(name) for name in ("rs-consistency", "jax", "jaxlib", "flax", "numpy", "scipy")}
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "versions": {"python": platform.python_version(), **versions},
        **code_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.to_dict(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, argv)
