"""Files of other programs in the order of the original files, compared image by image with files of this program."""

import gzip
import json

import numpy as np
import pytest

from rs_consistency import data
from rs_consistency.certificates.matching import match_images
from rs_consistency.certificates.proof import load
from rs_consistency.common.errors import UserError
from tests.helpers import write_idx, write_tfds

N = 12
ORDER = np.array([7, 2, 11, 9, 0, 5, 3, 1, 10, 4, 8, 6])  # original number of the image at each place
FIELD = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
OURS = FIELD.replace("\n", "\tcount0\tcount\tcount_runner_up\tselected\n")


def radius(image):
    """The radius of every original number; the equal images 3 and 7 have the same."""
    return 0.1 + (3 if image == 7 else image) / 10


class World:
    """A prepared MNIST of 12 test images, its original files, and a certificate file of each kind."""

    def __init__(self, folder):
        self.folder, self.originals, self.theirs = folder, folder / "originals", folder / "theirs.tsv"
        rng = np.random.default_rng(0)
        self.images, self.labels = rng.integers(0, 256, (N, 28, 28, 1), dtype=np.uint8), np.arange(N) % 10
        self.images[7], self.labels[7] = self.images[3], self.labels[3]  # twice the same example
        self.images[9] = self.images[2]  # the same pixels, with another label
        write_idx(self.originals, "t10k", self.images, self.labels)
        self.shuffled = self.images[ORDER], self.labels[ORDER]
        home = folder / "tfds"
        write_tfds(home, "mnist", "3.0.1", {"train": self.shuffled, "test": self.shuffled})
        config = {"dataset": {"data_dir": str(home), "cache_dir": str(folder / "cache")}}
        content = {"mode": "certify", "sigma": 1.0, "n": 1000, "alpha": 0.001, "seed": 0, "n0": 100}
        content |= {"bound": "clopper_pearson", "dataset": "mnist", "split": "test", "parameter_digest": "aa"}
        content |= {"data_digest": data.Split(*self.shuffled).digest(), "skip": 2, "split_size": N, "shard": None}
        self.record = {**content, "identity": list(content), "max": 6, "config": config}
        self.ours = self.write_ours("ours")
        self.write_theirs(range(N))

    def write_ours(self, name, **changes):
        """Every second image, with a radius 0.05 larger than theirs."""
        lines = [
            f"{place}\t{self.labels[i]}\t{self.labels[i]}\t{radius(i) + 0.05:.6f}\t1\t0:00:01.000000\t100\t1000\t0"
            f"\t{self.labels[i]}\n"
            for place, i in enumerate(ORDER)
            if place % 2 == 0
        ]
        path = self.folder / f"{name}.tsv"
        path.write_text(OURS + "".join(lines))
        path.with_suffix(".json").write_text(json.dumps(self.record | changes))
        return path

    def write_theirs(self, images, shift=0):
        labels = {i: (self.labels[i % N] + shift) % 10 for i in images}
        lines = [f"{i}\t{label}\t{label}\t{radius(i):.3}\t1\t0:00:01\n" for i, label in labels.items()]
        self.theirs.write_text(FIELD + "".join(lines))

    def match(self, *paths, **options):
        files = [(path, load(path)[0]) for path in paths or (self.ours, self.theirs)]
        return match_images(files, self.originals, **options)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_images_are_found_by_pixels_and_label(world):
    ours, theirs = world.match()
    assert ours.idx.tolist() == [0, 2, 4, 6, 8, 10]  # as they were
    np.testing.assert_array_equal(world.shuffled[0][theirs.idx], world.images)
    np.testing.assert_array_equal(world.shuffled[1][theirs.idx], world.labels)
    assert sorted(theirs.idx) == list(range(N))
    # Original images 3 and 7 are equal. The first of them is the first in the other order, too: that is number 7.
    assert theirs.idx[3] == ORDER.tolist().index(7) < theirs.idx[7] == ORDER.tolist().index(3)
    np.testing.assert_allclose(theirs.radius, [radius(i) for i in range(N)])


def test_the_comparison_is_image_by_image(world, program):
    command = ["cli.analyze", world.ours, world.theirs, "--radii", 0]
    match = f"--match_images={world.originals}"
    line = program.succeeds(*command, match, "--format=markdown").out.splitlines()[-1]
    assert line.startswith(f"| {world.ours} | {world.theirs} | 6 | +0.0500 | 0.0000 | +0.0500 to +0.0500 | 6 | 0 |")
    assert "ACR difference" in program.succeeds(*command, match).out
    assert "format=json has no comparisons" in program.fails(*command, match, "--format=json")
    report = world.folder / "report"
    assert "report: " in program.succeeds(*command, match, f"--output={report}", "--no_network").out
    rows = [row.split(",") for row in (report / "differences.csv").read_text().splitlines()[1:]]
    assert sorted(int(row[2]) for row in rows) == [0, 2, 4, 6, 8, 10]
    assert [float(row[-1]) for row in rows] == pytest.approx([0.05] * 6)
    assert "ACR difference" not in program.succeeds(*command).out


def test_files_that_are_all_of_this_program_need_no_original(world):
    world.originals = world.folder / "nothing"
    (ours,) = world.match(world.ours)
    assert ours.idx.tolist() == [0, 2, 4, 6, 8, 10]


def test_packed_results_are_known_by_their_record(world):
    packed = world.folder / "ours.tsv.gz"
    packed.write_bytes(gzip.compress(world.ours.read_bytes()))
    assert [table.idx.tolist() for table in world.match(packed, world.theirs)] == [
        table.idx.tolist() for table in world.match()
    ]


def test_a_folder_of_prepared_datasets_can_be_given(world):
    moved = world.folder / "tfds2"
    (world.folder / "tfds").rename(moved)
    with pytest.raises(UserError, match="is not prepared in"):
        world.match()
    assert len(world.match(data_dir=str(moved))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: world.write_theirs([0, N]), r"theirs\.tsv, image 12 is outside 0\.\.11 of mnist \(test\)"),
        (lambda world: world.write_theirs([-1]), r"image -1 is outside 0\.\.11"),
        (
            lambda world: world.write_theirs([5], shift=1),
            r"image 5: label 6, but 5 in the original files of mnist \(test\); give a file in their order",
        ),
        (
            lambda world: write_idx(world.originals, "t10k", 255 - world.images, world.labels),
            r"image 0 of the original files is not in mnist \(test\)",
        ),
        (
            lambda world: write_idx(world.originals, "t10k", world.images[[3, 3, 3]], world.labels[[3, 3, 3]]),
            r"image 0: label 0, but 3 in the original",
        ),
        (lambda world: (world.originals / "t10k-labels-idx1-ubyte.gz").unlink(), "has no t10k-labels-idx1-ubyte.gz"),
        (lambda world: world.ours.with_suffix(".json").unlink(), "no PATH has a record of certify.py that names its"),
        (
            lambda world: world.write_ours("ours", data_digest="bb"),
            r"as it is prepared here is not the data that .*ours",
        ),
        (lambda world: world.write_ours("ours", dataset="svhn"), "svhn: its original files cannot be read here"),
        (lambda world: world.write_ours("ours", dataset="mnist_subset"), "leave match_images out"),
    ],
)
def test_bad_input_is_named(world, change, message):
    change(world)
    with pytest.raises(UserError, match=message):
        world.match()


def test_the_program_names_a_missing_folder(world, program):
    error = program.fails("cli.analyze", world.ours, world.theirs, f"--match_images={world.folder / 'nothing'}")
    assert "nothing has no t10k-images-idx3-ubyte" in error


def test_files_of_different_images_are_refused(world):
    other = world.write_ours("other", split="train")
    with pytest.raises(UserError, match=r"ours\.tsv and .*other\.tsv are not of the same images"):
        world.match(world.ours, other, world.theirs)
