"""Download of a dataset and preparation as array_record, which is then read without TensorFlow."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import requests

from rs_consistency.common.errors import UserError, first_line
from rs_consistency.common.files import local_path
from rs_consistency.common.process import run
from rs_consistency.data.tfds import file_format, prepared_versions, resolve_data_dir, tfds_name

_PROBE_SECONDS = 5
_MNIST_FILES = tuple(
    f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class Original(NamedTuple):
    """The origin of a dataset."""

    url: str  # from which TFDS downloads; empty if a licence is needed
    files: tuple[str, ...]  # names of the original files


ORIGINALS: dict[str, Original] = {
    "mnist": Original("https://storage.googleapis.com/cvdf-datasets/mnist/", _MNIST_FILES),
    "fashion_mnist": Original("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", _MNIST_FILES),
    "cifar10": Original("https://www.cs.toronto.edu/~kriz/cifar.html", ("cifar-10-binary.tar.gz",)),
    "cifar100": Original("https://www.cs.toronto.edu/~kriz/cifar.html", ("cifar-100-binary.tar.gz",)),
    "svhn": Original(
        "http://ufldl.stanford.edu/housenumbers/", ("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat")
    ),
    "imagenet": Original("", ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")),
}


def prepare(name: str, *, data_dir: str = "", manual_dir: str = "") -> Path:
    """Prepare a dataset of `ORIGINALS`, and return the prepared folder.

    An empty data_dir stands for TFDS's own (`resolve_data_dir`). The original files come from manual_dir; if it is
    empty, they are downloaded. An unknown name, missing files, TensorFlow that is missing, and a download out of reach
    are a `UserError` within seconds.
    """
    if name not in ORIGINALS:
        raise UserError(f"dataset {name!r} cannot be prepared; use one of {', '.join(ORIGINALS)}")
    folder = resolve_data_dir(data_dir)
    for prepared in prepared_versions(name, folder):
        if file_format(prepared) == "array_record":
            return prepared  # needs neither TensorFlow nor a network
        raise UserError(
            f"{prepared} is already prepared, as {file_format(prepared)}: it can be read where TensorFlow is"
            " installed; for array_record give another --data_dir"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"preparing {name!r} needs TensorFlow, which is not installed: pip install tensorflow-cpu")
    originals = local_path(manual_dir, "manual_dir") if manual_dir else None
    if originals:
        _check_files(name, originals)
    elif ORIGINALS[name].url:
        _check_network(name)
    else:
        raise UserError(
            f"{name!r} cannot be downloaded without a licence; get {' and '.join(ORIGINALS[name].files)}"
            " (image-net.org), and give their folder with --manual_dir"
        )

    import tensorflow_datasets as tfds

    download_config = tfds.download.DownloadConfig(manual_dir=str(originals.resolve()) if originals else None)
    try:
        builder = tfds.builder(tfds_name(name), data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare(download_config=download_config)
    except Exception as error:  # downloads, checksums and writing fail in many ways
        remedy = "give the original files" if originals else "try again"
        raise UserError(f"{name!r} could not be prepared: {first_line(error)}; {remedy}") from error
    return Path(builder.data_path)


def _check_files(name: str, manual_dir: Path) -> None:
    if not manual_dir.is_dir():
        raise UserError(f"manual_dir={manual_dir} is not a folder; give the one with the original files")
    missing = [file for file in ORIGINALS[name].files if not (manual_dir / file).is_file()]
    if missing:
        raise UserError(f"manual_dir={manual_dir} lacks {', '.join(missing)}; put the original files there")


def _check_network(name: str) -> None:
    """Raise within seconds if the download is out of reach: TFDS would retry for minutes."""
    url = ORIGINALS[name].url
    try:
        requests.head(url, timeout=_PROBE_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        raise UserError(
            f"{name!r} cannot be downloaded: {url} is out of reach ({type(error).__name__}); connect to the"
            " network, or give the original files with --manual_dir"
        ) from None


if __name__ == "__main__":
    run("rs_consistency.cli.prepare")
