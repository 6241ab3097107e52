"""Files of torch.save, built here byte for byte: read to their numbers, or refused in one line within their size."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency.common.errors import UserError
from rs_consistency.models.torch_checkpoints import read_torch_checkpoint

NUMBERS = np.arange(6, dtype=np.float32)
BYTES = NUMBERS.tobytes()
STORED = (("0", BYTES),)
ORDERED = b"ccollections\nOrderedDict\n)R"


def integer(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def text(value):
    value = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(value)) + value


def storage(*, kind="Float", key="0", location="cpu", numel=6, rest=b""):
    words = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text(location)
    return words + integer(numel) + rest + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, *, flags=b"", **of_storage):
    sizes = b"".join(b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + storage(**of_storage) + integer(offset) + sizes + b"\x89" + ORDERED + flags + b"tR"


def legacy_tensor(*args, **settings):
    return tensor(*args, rest=b"N", **settings)


def state(value, name="1.conv1.weight", header=b""):
    inner = b"}" + text(name) + value + b"s"
    return b"\x80\x02}" + text("state_dict") + inner + b"s" + header + b"."


def zipped(pickled, *, method=zipfile.ZIP_STORED, folder="a/", storages=STORED, byteorder="little"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.writestr(f"{folder}data.pkl", pickled)
        archive.writestr(f"{folder}byteorder", byteorder)
        for key, numbers in storages:
            archive.writestr(f"{folder}data/{key}", numbers)
    return content.getvalue()


def legacy(pickled, *, numel=6, numbers=BYTES, magic=0x1950A86A20F9469CFC6C, little=True):
    parts = [pickle.dumps(part, 2) for part in (magic, 1001, {"little_endian": little})]
    return b"".join([*parts, pickled, pickle.dumps(["0"], 2), struct.pack("<Q", numel), numbers])


def overlapping(count):
    """An archive of many names for the same bytes."""
    numbers, folder = bytes(100_000), b""
    about = struct.pack("<HHHHIII", 0, 0, 0, 0, zlib.crc32(numbers), len(numbers), len(numbers))
    for number in range(count):
        name = f"a/data/{number}".encode()
        folder += b"PK\x01\x02" + struct.pack("<HH", 20, 20) + about + struct.pack("<H12xI", len(name), 0) + name
    first = b"PK\x03\x04" + struct.pack("<H", 20) + about + struct.pack("<HH", 8, 0) + b"a/data/0" + numbers
    return first + folder + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(folder), len(first), 0)


def headed(key, value):
    return zipped(state(tensor(), header=text(key) + value + b"s"))


def both(path, *args, numel=6, **settings):
    """The tensor of both forms of a file."""
    for made in (
        zipped(state(tensor(*args, numel=numel, **settings))),
        legacy(state(legacy_tensor(*args, numel=numel, **settings)), numel=numel),
    ):
        yield read(path, made).tensors["1.conv1.weight"]


def read(path, content):
    path.write_bytes(content)
    return read_torch_checkpoint(path)


def test_tensors_are_read_with_their_strides_and_types(tmp_path):
    path = tmp_path / "a"
    for shape, strides, offset in (
        ((2, 3), (3, 1), 0),
        ((3, 2), (1, 3), 0),
        ((2,), (2,), 1),
        ((2, 4), (1, 0), 4),
        ((), (), 5),
        ((0, 4), (4, 1), 0),
    ):
        wanted = np.lib.stride_tricks.as_strided(NUMBERS[offset:], shape, [4 * stride for stride in strides])
        for found in both(path, shape, strides, offset):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, wanted)
    for found in both(path, location="cuda:7"):  # where it was does not matter
        np.testing.assert_array_equal(found.ravel(), NUMBERS)
    kinds = {"Half": np.float16, "BFloat16": jnp.bfloat16, "Int": np.int32, "ComplexFloat": np.complex64, "Bool": bool}
    for kind, dtype in kinds.items():
        wanted = np.frombuffer(BYTES, dtype)
        for found in both(path, (wanted.size,), (1,), kind=kind, numel=wanted.size):
            assert found.dtype == dtype and found.tobytes() == BYTES


def test_parameters_headers_and_versions_of_pickle_are_read(tmp_path):
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88" + ORDERED + b"tR"
    header = text("arch") + text("lenet") + b"s" + text("epoch") + integer(90) + b"s"
    found = read(tmp_path / "a", zipped(state(parameter, header=header)))
    assert (found.arch, found.epoch) == ("lenet", 90)
    np.testing.assert_array_equal(found.tensors["1.conv1.weight"], NUMBERS.reshape(2, 3))
    # A header of every kind of plain data, as each protocol of pickle writes it, beside the state.
    plain = {"a": [1, -(2**70), 0.5, None, True], "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 3: "ü", "c": b"x"}
    plain["d"] = [plain["a"], {"e": [[]] * 1000}]
    for protocol in (2, 3, 4, 5):
        if protocol == 2:
            del plain["c"]  # bytes are a call of codecs there
        body = pickle.dumps(plain, protocol)[2:-1]
        plain["c"] = b"x"
        assert read(tmp_path / "a", headed("more", body)).tensors.keys()


CALLS = {
    "protocol 0": lambda victim: f"cpathlib\nPath\n(V{victim}\ntRcbuiltins\nopen\n(V{victim}\nVw\ntR".encode(),
    "STACK_GLOBAL": lambda victim: b"\x8c\x08builtins\x8c\x04open\x93" + text(str(victim)) + text("w") + b"\x86R",
    "INST": lambda victim: b"(" + text(str(victim)) + text("w") + b"ibuiltins\nopen\n",
    "OBJ": lambda victim: b"(cbuiltins\nopen\n" + text(str(victim)) + text("w") + b"o",
    "NEWOBJ": lambda victim: b"cio\nFileIO\n" + text(str(victim)) + text("w") + b"\x86\x81",
    "NEWOBJ_EX": lambda victim: b"cio\nFileIO\n" + text(str(victim)) + text("w") + b"\x86}\x92",
    "EXT1": lambda victim: b"\x82\x01",
    "a storage called": lambda victim: b"ctorch\nFloatStorage\n" + integer(10**9) + b"\x85R",
    "a storage made of nothing": lambda victim: b"ctorch\nFloatStorage\n)R",
    "torch.load": lambda victim: b"ctorch\nload\n" + text(str(victim)) + b"\x85R",
    "dotted": lambda victim: b"\x8c\x05torch\x8c\x0eTensor.tolist\x93",
    "state of a name": lambda victim: b"ctorch\nFloatStorage\n}b",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_no_call_is_executed(tmp_path, call, form):
    victim = tmp_path / "victim"
    header = text("more") + CALLS[call](victim) + b"s"
    made = zipped(state(tensor(), header=header)) if form == "zip" else legacy(state(legacy_tensor(), header=header))
    with pytest.raises(UserError, match=r"cannot be read as weights alone .*code in a checkpoint is never executed"):
        read(tmp_path / "a", made)
    assert not victim.exists()


FEW_BYTES = {
    "a call for 10 GB": (
        zipped(b"\x80\x02c__builtin__\nbytearray\n" + integer(10**10) + b"\x85R."),
        r"__builtin__.bytearray",
    ),
    "a tensor without numbers": (zipped(b"\x80\x02ctorch\nTensor\n" + integer(10**10) + b"\x85R."), r"torch.Tensor"),
    "a storage of 4 TB": (zipped(state(tensor((10**12,), (1,), numel=10**12))), r"reaches beyond its 24 bytes"),
    "a storage of 4 TB, legacy": (
        legacy(state(legacy_tensor((10**12,), (1,), numel=10**12)), numel=10**12),
        r"cut short",
    ),
    "a negative storage": (legacy(state(legacy_tensor()), numel=2**64 - 1), r"cut short"),
    "a memo of 16 GB": (zipped(b"\x80\x02Nr\xff\xff\xff\x7f."), r"no state dictionary"),
    "a text of 4 GB": (zipped(b"\x80\x02X\xff\xff\xff\xff."), r"unicodestring4"),
    "bytes of 2**60": (zipped(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"."), r"bytes8"),
    "packed numbers": (
        zipped(state(tensor()), method=zipfile.ZIP_DEFLATED, storages=[("0", bytes(3 * 10**7))]),
        r"compressed",
    ),
    "packed pickle": (zipped(state(tensor()) + bytes(3 * 10**7), method=zipfile.ZIP_BZIP2), r"compressed"),
    "overlapping parts": (overlapping(200), r"overlap"),
    "a key that is hashed for years": (
        zipped(b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0Ns."),
        r"a tuple where a str",
    ),
    "many lists in lists": (zipped(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."), r"no state dictionary"),
    "half as an array of 2 TB": (zipped(state(tensor((10**12,), (0,), kind="Half"))), None),
    "the same numbers 500 times": (
        zipped(b"\x80\x02}(" + b"".join(text(f"t{number}") + tensor() for number in range(500)) + b"u."),
        None,
    ),
}


@pytest.mark.parametrize("content", FEW_BYTES)
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path, content):
    made, reason = FEW_BYTES[content]
    path = tmp_path / "a"
    path.write_bytes(made)
    tracemalloc.start()
    try:
        if reason is None:
            read_torch_checkpoint(path)
        else:
            with pytest.raises(UserError, match=reason) as caught:
                read_torch_checkpoint(path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000 + 20 * len(made)


HUGE = b"\x8b" + struct.pack("<I", 4200) + b"\x01" * 4200

REFUSED = {
    "beyond its numbers": (zipped(state(tensor((3, 3)))), r"shape \(3, 3\) reaches beyond its 24 bytes"),
    "an offset beyond": (zipped(state(tensor(offset=1))), r"reaches beyond"),
    "numbers cut short": (zipped(state(tensor()), storages=[("0", bytes(20))]), r"reaches beyond its 20 bytes"),
    "products that overflow": (zipped(state(tensor((2**32 + 1, 1), (2**32, 1)))), r"reaches beyond"),
    "sizes that overflow": (zipped(state(tensor((2**40, 2**40), (0, 0)))), r"too big|too large"),
    "a negative size": (zipped(state(tensor((-2, 3)))), r"negative size or stride"),
    "a negative stride": (zipped(state(tensor((2,), (-1,), 3))), r"negative size or stride"),
    "fewer strides": (zipped(state(tensor((2, 3), (1,)))), r"argument"),
    "100 axes": (zipped(state(tensor((1,) * 100, (1,) * 100))), r"dimension"),
    "a negated view": (zipped(state(tensor(flags=b"}" + text("neg") + b"\x88s"))), r"conjugated or negated"),
    "quantized": (zipped(state(tensor(kind="QInt8"))), r"needs 'torch.QInt8Storage', which is neither plain"),
    "sparse": (zipped(state(b"ctorch._utils\n_rebuild_sparse_tensor\n")), r"'torch._utils._rebuild_sparse_tensor'"),
    "TorchScript": (zipped(b"\x80\x02c__torch__.net\nNet\n)\x81."), r"needs '__torch__.net.Net'"),
    "a missing storage": (zipped(state(tensor(key="7"))), r"no item named"),
    "a key elsewhere": (zipped(state(tensor(key="../../etc/passwd"))), r"no item named"),
    "big-endian": (zipped(state(tensor()), byteorder="big"), r"big-endian"),
    "big-endian, legacy": (legacy(state(legacy_tensor()), little=False), r"big-endian"),
    "another magic number": (legacy(state(legacy_tensor()), magic=1), r"no file of torch.save"),
    "a storage inside of another": (legacy(state(tensor(rest=b")"))), r"storages inside"),
    "no folder": (zipped(state(tensor()), folder=""), r"without data.pkl"),
    "a terminal's codes": (zipped(b"\x80\x02cos\x1b[31m\nsystem\n."), r"needs 'os\\x1b\[31m.system'"),
    "a long name": (zipped(b"\x80\x02c" + b"x" * 10**5 + b"\nsystem\n."), r"needs 'x{100}'"),
    "a number for a dictionary": (zipped(b"\x80\x02K\x01K\x02K\x03s."), r"a int where a dict belongs"),
    "an empty pickle": (zipped(b""), r"exhausted"),
    "no pickle": (zipped(b"hello"), r"cannot be read"),
    "text": (b"hello", r"no file of torch.save"),
    "nothing": (b"", r"no file of torch.save"),
    "a plain pickle": (pickle.dumps({"a": 1}, 2), r"cannot be read"),
    "a number": (zipped(b"\x80\x02K\x01."), r"no state dictionary"),
    "a state in a state": (zipped(state(b"}" + text("a") + tensor() + b"s")), r"no state dictionary"),
    "a number for a name": (zipped(b"\x80\x02}K\x01" + tensor() + b"s."), r"no state dictionary"),
    "itself": (zipped(b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s."), r"no state dictionary"),
    "an arch of control characters": (headed("arch", text("\x1b[31m\n")), r"an arch that is no name"),
    "an arch of a megabyte": (headed("arch", text("a" * 10**6)), r"an arch that is no name"),
    "a number for an arch": (headed("arch", integer(7)), r"an arch that is no name"),
    "an epoch of 10,000 digits": (headed("epoch", HUGE), r"an epoch that is no count"),
    "an epoch below 0": (headed("epoch", integer(-1)), r"an epoch that is no count"),
    "a boolean for an epoch": (headed("epoch", b"\x88"), r"an epoch that is no count"),
}


@pytest.mark.parametrize("content", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(tmp_path, content):
    made, reason = REFUSED[content]
    with pytest.raises(UserError, match=reason) as caught:
        read(tmp_path / "a", made)
    message = str(caught.value)
    assert message.startswith(f"torch_checkpoint={tmp_path / 'a'} ") and message.isprintable() and len(message) < 600


def test_files_cut_short_or_changed_are_refused_or_read_the_same(tmp_path):
    path, rng = tmp_path / "a", np.random.default_rng(0)
    for made, checked in ((zipped(state(tensor())), True), (legacy(state(legacy_tensor())), False)):
        for size in range(0, len(made), 5):
            with pytest.raises(UserError, match=r"cannot be read as weights alone"):
                read(path, made[:size])
        for _ in range(100):
            changed = bytearray(made)
            changed[rng.integers(len(made))] ^= 1 << rng.integers(8)
            try:
                found = read(path, bytes(changed)).tensors
            except UserError as error:
                assert str(error).isprintable()
                continue
            if checked:  # by the sums in the archive
                np.testing.assert_array_equal(found["1.conv1.weight"].ravel(), NUMBERS)


def test_places_that_are_no_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(UserError, match=r"is no file; give a file such as checkpoint.pth.tar"):
            read_torch_checkpoint(path)
    with pytest.raises(UserError, match=r"torch_checkpoint=.*nowhere does not exist"):
        read_torch_checkpoint(tmp_path / "nowhere")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300), None, 7):
        with pytest.raises(UserError, match=r"torch_checkpoint="):
            read_torch_checkpoint(path)
