"""Helpers of several test modules."""

import gzip
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from rs_consistency import noise
from rs_consistency.statistics.rounded_gaussian import grid_table

ROOT = Path(__file__).parents[1]

# Two epochs of 7 steps (the last one filled up) on the small MNIST, on all 8 devices.
TINY = [
    f"--config={ROOT}/configs/mnist.py",
    "--config.batch_size=64",
    "--config.num_epochs=2",
    "--config.eval_batch_size=25",
]
# The same with the linear model of toy.py: for tests whose subject is no network.
TOY = [*TINY, "--config.model=linear"]


class Program:
    """Runs a program's main function; its `status`, `out` and `err` are those of the last call."""

    def __init__(self, capture):
        self._capture = capture

    def __call__(self, name, *args):
        self._capture.readouterr()
        main = importlib.import_module(f"rs_consistency.{name}").main
        try:
            main([str(arg) for arg in args])
            self.status = 0
        except SystemExit as stop:
            self.status = stop.code
        self.out, self.err = self._capture.readouterr()
        return self

    def succeeds(self, name, *args):
        self(name, *args)
        assert self.status == 0, self.err
        assert "Traceback" not in self.err
        return self

    def fails(self, name, *args):
        """Fails as users should see it: non-zero, one line of error, no traceback. Returns that line."""
        self(name, *args)
        assert self.status not in (0, None)
        lines = [line for line in self.err.splitlines() if line and not line.startswith(("note: ", "certifying", "\r"))]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


# Runs a script that knows the model of toy.py, in the runs of a plan as well.
_WITH_TOY = f"""
import runpy, sys
sys.path[0] = {str(ROOT)!r}
import tests.toy
if sys.argv[1].endswith("reproduce.py"):
    from rs_consistency.reproduction.runner import Runner
    from tests.plans import TOYS
    Runner.__init__.__kwdefaults__["modules"] = TOYS
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# A shell's background jobs, such as a CI's, ignore Ctrl-C, and what nohup starts SIGHUP; so would their children.
CTRL_C_WORKS = ("env", "--default-signal=INT,HUP")


def start(script, *args, toy=False, limit_kib=None, cwd=ROOT):
    """Start a top-level script in a process of its own, as a user would.

    With `toy` it knows the linear model. No file may grow beyond the limit. The process reads the suite's compiled
    programs and adds none, so that killing it cannot leave half of one behind.
    """
    runner = ["-c", _WITH_TOY] if toy else []
    command = [*CTRL_C_WORKS, sys.executable, *runner, str(ROOT / script), *map(str, args)]
    if limit_kib:
        command = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "bash", *command]
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_when(process, ready, seconds=120):
    """Kills a process with SIGKILL as soon as `ready()`; fails when it ends by itself or takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()}"
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "ended before it was killed"


# In `make test-torch`, nothing is skipped: without PyTorch the import fails.
lacks_torch = "RS_CONSISTENCY_NEEDS_TORCH" not in os.environ and importlib.util.find_spec("torch") is None
needs_torch = pytest.mark.skipif(lacks_torch, reason="needs PyTorch")


def processes_with(text):
    """The running parts of a plan whose command line has a text in it."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line and "reproduction.child" in line]


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_tfds(folder, name, version, splits):
    """Writes a dataset as TFDS prepares it in array_record format, without TensorFlow."""
    shape = next(iter(splits.values()))[0].shape[1:]
    encoded = {
        split: ([encode(image[..., 0] if shape[-1] == 1 else image, "PNG") for image in images], labels)
        for split, (images, labels) in splits.items()
    }
    return write_encoded_tfds(folder, name, version, encoded, {"shape": shape, "classes": 10})


def write_idx(folder, part, images, labels, *, packed=True):
    """Writes a split as the original files of MNIST: images [N, H, W, 1], and part `train` or `t10k`."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
        content = b"\x00\x00\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes()
        content += values.astype(np.uint8).tobytes()
        path = folder / f"{part}-{kind}-ubyte{'.gz' * packed}"
        path.write_bytes(gzip.compress(content) if packed else content)


def write_imagenet(folder, splits, num_shards=2):
    """Writes `{split: (JPEG files, labels)}` as TFDS prepares imagenet2012."""
    about = {"shape": (-1, -1, 3), "classes": 1000, "encodingFormat": "jpeg"}
    return write_encoded_tfds(folder, "imagenet2012", "5.1.0", splits, about, num_shards)


def write_encoded_tfds(folder, name, version, splits, about, num_shards=1):
    """Writes `{split: (encoded images, labels)}`; a split has the given number of files."""
    home = folder / name / version
    home.mkdir(parents=True)
    infos = []
    for split, (images, labels) in splits.items():
        parts = np.array_split(np.arange(len(labels)), num_shards)
        for number, part in enumerate(parts):
            path = home / f"{name}-{split}.array_record-{number:05}-of-{num_shards:05}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for i in part:
                writer.write(_example(images[i], int(labels[i])).SerializeToString())
            writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(len(part)) for part in parts]
        infos.append({"name": split, "shardLengths": lengths, "filepathTemplate": template, "numBytes": "1"})
    image = {"shape": {"dimensions": list(map(str, about["shape"]))}, "dtype": "uint8"}
    if "encodingFormat" in about:
        image["encodingFormat"] = about["encodingFormat"]
    core = "tensorflow_datasets.core.features"
    classes = {"numClasses": str(about["classes"])}
    features = {
        "image": {"image": image, "pythonClassName": f"{core}.image_feature.Image"},
        "label": {"classLabel": classes, "pythonClassName": f"{core}.class_label_feature.ClassLabel"},
    }
    features = {"featuresDict": {"features": features}, "pythonClassName": f"{core}.features_dict.FeaturesDict"}
    (home / "features.json").write_text(json.dumps(features))
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": infos}
    (home / "dataset_info.json").write_text(json.dumps(info))
    return home


def encode(image, format, **options):
    """An image file's content; of an array or a PIL image."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _example(encoded, label):
    feature = tf_feature_pb2.Feature
    fields = {
        "image": feature(bytes_list=tf_feature_pb2.BytesList(value=[encoded])),
        "label": feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
    }
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=fields))


def final_variables(workdir):
    """The model's variables in a run's newest checkpoint, as NumPy arrays."""
    from rs_consistency.training import runs

    return jax.tree.map(np.asarray, runs.restore(workdir, jax.devices()[:1]).variables)


def final_params(workdir):
    """The parameters alone."""
    return final_variables(workdir)["params"]


def rows(path):
    """The lines of a certificate file without the time column, which no two runs share."""
    lines = [line.split("\t") for line in Path(path).read_text().splitlines()]
    time_column = lines[0].index("time")
    return [line[:time_column] + line[time_column + 1 :] for line in lines]


def damage_checkpoint(step_folder, damage):
    """Damage a checkpoint as disks and kills do: an empty folder, a cut or changed data file, a missing manifest."""
    data_files = sorted((step_folder / "default").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest = data_files[-1].read_bytes()
    if damage == "empty":
        shutil.rmtree(step_folder)
        step_folder.mkdir()
    elif damage == "truncated":
        data_files[-1].write_bytes(largest[: len(largest) // 2])
    elif damage == "flipped":
        middle = len(largest) // 2
        data_files[-1].write_bytes(largest[:middle] + bytes([largest[middle] ^ 1]) + largest[middle + 1 :])
    else:
        (step_folder / "default" / "manifest.ocdbt").unlink()


def grid_draws(key, index, phase, vote, *, shape, sigma):
    """Return noise on the grid, `[N, *shape]` int32, of votes by their addresses `[N]`; phase 1 is the estimation."""
    packed, low, _ = grid_table(sigma)
    addresses = np.broadcast_arrays(np.atleast_1d(index), phase * 2**30 + vote)
    index, number = (jnp.asarray(each, jnp.int32) for each in addresses)
    return noise.grid_noise(key, index, number, shape=shape, packed=packed, low=low)
