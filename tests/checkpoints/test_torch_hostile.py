"""Hostile files are rejected in one line, in little memory, and nothing in them is executed.

Run as a program, this file opens each file that it is given under a limit of memory.
"""

import ast
import json
import os
import pickletools
import resource
import struct
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
from hostile import archive, group, name, number, state, storage, tensor, text

import jaxtune.checkpoints
from jaxtune.checkpoints.formats.torch_file import TorchFile
from jaxtune.errors import JaxtuneError

LIMIT = 300 * 2**20


def opened(path):
    """Opens a file and reads all of it; returns the message if it is refused."""
    try:
        file = TorchFile(path)
        for tensor_name in file.names():
            value = file.read(tensor_name)
            assert value.shape == file.shape(tensor_name)
            value.tobytes()
    except JaxtuneError as error:
        assert str(error).isprintable()
        return str(error)
    return ""


def refusal(tmp_path, content):
    path = tmp_path / "f.bin"
    path.write_bytes(content)
    message = opened(path)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_valid_file_is_read(tmp_path):
    """Or a refusal below would say nothing."""
    (tmp_path / "f.bin").write_bytes(archive(state(("a", tensor()), ("b", tensor((2,), (3,), 5)))))
    file = TorchFile(tmp_path / "f.bin")
    assert file.names() == ["a", "b"]
    assert file.read("a").tobytes() == bytes(64)


def test_nothing_that_a_pickle_names_is_called(tmp_path):
    evil = [
        ("os.system", f"touch {tmp_path / 'touched'}"),
        ("posix.system", f"touch {tmp_path / 'touched'}"),
        ("builtins.eval", f"open({str(tmp_path / 'touched')!r}, 'w')"),
        ("builtins.exec", f"open({str(tmp_path / 'touched')!r}, 'w')"),
        ("builtins.open", str(tmp_path / "touched"), "w"),
        ("builtins.getattr", "os", "system"),
        ("torch.hub.load_state_dict_from_url", "http://127.0.0.1:9"),
        ("torch._utils.os.system", f"touch {tmp_path / 'touched'}"),
        ("this.d", "imports a module that prints"),
    ]
    for dotted, *arguments in evil:
        for how, pickle in hostile.calls(dotted, *arguments).items():
            message = refusal(tmp_path, archive(pickle))
            assert message.startswith("its pickle "), (dotted, how)
            if how in ("REDUCE", "STACK_GLOBAL", "in a value"):
                assert f"names {dotted}, which no state dict of plain tensors needs" in message
    assert not (tmp_path / "touched").exists()
    assert "this" not in sys.modules


def test_every_opcode_that_ordinary_files_lack_is_refused_by_name(tmp_path):
    used = {
        *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE"),
        *("EMPTY_DICT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
        *("SHORT_BINUNICODE", "BINUNICODE8", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM"),
        *("SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL"),
        *("STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"),
    }
    for info in pickletools.opcodes:
        pickle = info.code.encode("latin-1") + b"0\n0\n" + bytes(16)
        message = refusal(tmp_path, archive(pickle))
        assert (f"uses {info.name}, which no state dict needs" in message) == (
            info.name not in used
        )


def test_the_reader_imports_nothing_that_could_run_a_file():
    """It has no unpickler to begin with, so none of its settings can be wrong."""
    imported = set()
    for module in ("torch_file", "torch_names", "torch_pickle", "zip_directory"):
        path = Path(jaxtune.checkpoints.__file__).parent / "formats" / f"{module}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
            elif isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec", "getattr", "compile", "__import__"), module
    theirs = {each for each in imported if not each.startswith("jaxtune.")}
    assert theirs == {
        *("__future__", "collections.abc", "math", "mmap", "pathlib", "pickletools", "struct"),
        *("sys", "typing", "zlib", "ml_dtypes", "numpy"),
    }
    assert "pickle" not in imported


SIZES = {
    "an offset beyond the storage": tensor(offset=1),
    "a huge offset": tensor(offset=2**62),
    "a negative offset": tensor(offset=-1),
    "an offset of 65 bits": tensor(offset=2**64),
    "a shape beyond the storage": tensor((4, 5), (4, 1)),
    "strides beyond the storage": tensor((4, 4), (5, 1)),
    "a negative size": tensor((-4, 4), (4, 1)),
    "a negative stride": tensor((4, 4), (-4, 1)),
    "sizes whose product overflows": tensor((2**33, 2**33), (0, 0)),
    "fewer strides than sizes": tensor((4, 4), (1,)),
    "40 dimensions": tensor((1,) * 40, (1,) * 40),
    "a size that is true": tensor(group(b"\x88"), (1,)),
    "a size that is text": tensor(group(text("4")), (1,)),
    "a size that is a float": tensor(group(b"G" + struct.pack(">d", 4)), (1,)),
    "a shape that is a number": tensor(number(4), (1,)),
    "10^10 copies of one value": tensor((10**10,), (0,)),
    "10^9 windows of a storage": tensor((2**15, 2**15), (0, 0)),
    "a storage larger than its member": tensor(values=storage(count=17)),
    "a storage of 2^1000 values": tensor(values=storage(count=2**1000)),
    "a negative storage": tensor(values=storage(count=-1)),
    "a storage that is not there": tensor(values=storage(key="1")),
    "a storage with a path for a key": tensor(values=storage(key="../../../etc/passwd")),
    "a storage of a wider dtype": tensor(values=storage("torch.DoubleStorage")),
    "bytes without a dtype": tensor(values=storage("torch.storage.UntypedStorage", count=64)),
    "a dtype for a storage": tensor(values=storage("torch.float32")),
    "a function for a storage": tensor(values=name("collections.OrderedDict") + b")R"),
    "a tensor for a storage": tensor(values=tensor()),
    "hooks": tensor(hooks=b"}" + text("a") + b"Ns"),
    "hooks that are none": tensor(hooks=b"N"),
    "too few arguments": name("torch._utils._rebuild_tensor_v2") + b")R",
    "a dtype that is a storage class": tensor(
        values=storage("torch.storage.UntypedStorage", count=64),
        hooks=b"}" + name("torch.FloatStorage"),
        function="_rebuild_tensor_v3",
    ),
    "a parameter of nothing": name("torch._utils._rebuild_parameter") + b"(N\x88}tR",
}


@pytest.mark.parametrize("lie", SIZES)
def test_wrong_sizes_in_the_file(tmp_path, lie):
    assert refusal(tmp_path, archive(state(("a", SIZES[lie]))))


def test_a_storage_of_two_dtypes(tmp_path):
    """torch takes the first and misreads the second."""
    halves = tensor((4,), (1,), values=storage("torch.HalfStorage", count=32))
    message = refusal(tmp_path, archive(state(("a", tensor()), ("b", halves))))
    assert message == 'tensor "b": another tensor gives its storage another dtype or size'


DEEP = 10**6
COUNT = range(10**6)
INNER = [b"}%sh%csq%c" % (text("a"), i, i + 1) for i in range(200)]
WIDE = [text(f"{i}\U0001f600" + "a" * 50000) + b"Ns" for i in range(1500)]
PICKLES = {
    "nested as a value": b"\x80\2}" + text("a") + b")" + b"\x85" * DEEP + b"s.",
    "nested as a key": b"\x80\2}" + b")" + b"\x85" * DEEP + b"Ns.",
    "nested marks": b"\x80\2" + b"(" * DEEP,
    "nested dicts": b"\x80\2" + (b"}" + text("a")) * DEEP + b"N" + b"s" * DEEP + b".",
    "dicts nested from within": b"\x80\2}q\0" + b"".join(INNER) + b".",
    "a dict in itself": b"\x80\2}q\0" + text("a") + b"h\0s.",
    "a memo index of 2^31": b"\x80\2}r" + struct.pack("<I", 2**31) + b".",
    "a memo index of 2^27": b"\x80\2}r" + struct.pack("<I", 2**27) + b".",
    "a memo index that is not there": b"\x80\2j" + struct.pack("<I", 2**31) + b".",
    "a name of 2 GB": b"\x80\2}X" + struct.pack("<I", 2**31 - 1) + b"a.",
    "a name of 2^63 bytes": b"\x80\4}\x8d" + struct.pack("<Q", 2**63) + b"a.",
    "a frame of 2^63 bytes": b"\x80\4\x95" + struct.pack("<Q", 2**63),
    "a number of 2 GB": b"\x80\2\x8b" + struct.pack("<i", 2**31 - 1),
    "a name without an end": b"\x80\2c" + b"a" * 10**6,
    "a name that is not ASCII": b"\x80\2c\xff\n\xff\n)R.",
    "a name with line ends in a message": b"\x80\4" + text("a\nb") + text("\x1b[31m") + b"\x93.",
    "a name with a lone surrogate": state(("\ud800", tensor())),
    "a tensor name of two lines": state(("a\nb", tensor())),
    "a key twice": state(("a", tensor()), ("a", tensor())),
    "a key that is a number": state((number(1), tensor())),
    "a key that is a dict": state((b"}", tensor())),
    "a key that is a tensor": state((tensor(), tensor())),
    "attributes of a dict": b"\x80\2}}b.",
    "attributes of a tensor": state(("a", tensor() + b"}b")),
    "nothing": b"",
    "no end": b"\x80\2}",
    "an empty stack": b"\x80\2.",
    "two values": b"\x80\2}}.",
    "an open mark": b"\x80\2(}.",
    "a pop below a mark": b"\x80\2}(\x86.",
    "10^6 opcodes for nothing": b"\x80\2" + b"N" * 10**6 + b".",
    "10^6 values in a tuple": b"\x80\2(" + b")" * 10**6 + b"t.",
    "10^6 dicts": b"\x80\2}" + text("a") + b"(" + b"}(NNu" * 10**6 + b"t.",
    "10^7 opcodes that cancel out": b"\x80\2}" + b"(u" * 5 * 10**6 + b".",
    "10^7 memo entries": b"\x80\4}" + b"\x94" * 10**7 + b".",
    "10^6 dicts in a dict": b"\x80\2}" + b"".join(text(str(i)) + b"}s" for i in COUNT) + b".",
    "10^6 small dicts": b"\x80\2}"
    + b"".join(text(str(i)) + b"}X\0\0\0\0Nss" for i in COUNT) + b".",
    "10^6 names for one tensor": b"\x80\2}" + text("a") + tensor() + b"q\0s"
    + b"".join(text(str(i)) + b"h\0s" for i in COUNT) + b".",
    "wide names": b"\x80\2}" + b"".join(WIDE) + b".",
}  # fmt: skip
FILES = {
    "10^6 files in the directory": lambda: hostile.big_directory(10**6),
    "100,000 entries for one file": lambda: hostile.big_directory(100_000),
    "a member that unpacks to 4 GB": lambda: hostile.deflated(2**32 - 2),
    "two pickles": lambda: archive(state(("a", tensor())), **{"more/data.pkl": b"."}),
    "a pickle of 130 MB": lambda: archive(bytes(130 * 2**20)),
    "code beside the pickle": lambda: archive(state(("a", tensor())), **{"code/x.py": b""}),
}


def test_hostile_structures_are_rejected_in_little_memory(tmp_path):
    for number_of_file, content in enumerate(PICKLES.values()):
        (tmp_path / f"pickle-{number_of_file}.bin").write_bytes(archive(content))
    for number_of_file, make in enumerate(FILES.values()):
        (tmp_path / f"file-{number_of_file}.bin").write_bytes(make())
    names = [f"pickle-{i}.bin" for i in range(len(PICKLES))]
    names += [f"file-{i}.bin" for i in range(len(FILES))]
    command = [sys.executable, __file__, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    messages = dict(zip([*PICKLES, *FILES], json.loads(done.stdout), strict=True))
    assert {f: m for f, m in messages.items() if not m.startswith(f"{tmp_path}/")} == {}


def test_overlapping_members(tmp_path):
    overlap, other_name = hostile.overlapping()
    assert refusal(tmp_path, overlap) == "is not a valid zip file: its files overlap"
    assert refusal(tmp_path, other_name) == ("is not a valid zip file: its directory is malformed")


@pytest.mark.parametrize("part", range(4))
def test_randomly_corrupted_files(tmp_path, part):
    path, refused = tmp_path / "f.bin", 0
    for content in hostile.mutations(part, 100):
        path.write_bytes(content)
        refused += bool(opened(path))
    assert refused > 50  # a change may be harmless, as one of a value is


def limited(paths):
    """Opens files while this process may take no more than `LIMIT` beyond what it has."""
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if "VmData" in line) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + LIMIT,) * 2)
    messages = []
    for path in paths:
        here, there = os.pipe()
        if os.fork() == 0:  # so that what one file leaves behind does not count for the next
            os.write(there, opened(Path(path)).encode()[:1000] or b"-")
            os._exit(0)
        os.close(there)
        messages.append(os.read(here, 1000).decode())
    print(json.dumps(messages))


if __name__ == "__main__":
    limited(sys.argv[1:])
