"""Files that torch would not write: handmade ones, and random corruptions of valid ones."""

import io
import pickletools
import random
import struct
import zipfile

import torch

CODES = {info.name: info.code.encode("latin-1") for info in pickletools.opcodes}


def archive(pickle, storages=None, **others):
    """Returns a zip file with a data.pkl."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        for key, storage in ({"0": bytes(64)} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", storage)
        for name, member in others.items():
            file.writestr(f"archive/{name}", member)
    return content.getvalue()


def text(value):
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    size = max((value.bit_length() + 8) // 8, 1)
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(dotted):
    module, _, last = dotted.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n"


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(kind="torch.FloatStorage", key="0", count=16):
    size = number(count) if isinstance(count, int) else count
    return group(text("storage"), name(kind), text(key), text("cpu"), size) + b"Q"


def tensor(
    shape=(4, 4), strides=(4, 1), offset=0, values=None, hooks=b"}", function="_rebuild_tensor_v2"
):
    sizes = (
        group(*map(number, each)) if isinstance(each, tuple) else each for each in (shape, strides)
    )
    values = storage() if values is None else values
    return (
        name(f"torch._utils.{function}")
        + group(values, number(offset), *sizes, b"\x89", hooks)
        + b"R"
    )


def state(*items):
    """Returns the pickle of a dict: (key, value) as pickles or, for keys, as text."""
    pairs = b"".join((text(k) if isinstance(k, str) else k) + v for k, v in items)
    return b"\x80\2}(" + pairs + b"u."


def calls(dotted, *arguments):
    """Returns the pickles that call something while they are read, in every way there is."""
    given = b"".join(map(text, arguments))
    module, _, last = dotted.rpartition(".")
    return {
        "REDUCE": b"\x80\2" + name(dotted) + b"(" + given + b"tR.",
        "STACK_GLOBAL": b"\x80\4" + text(module) + text(last) + b"\x93(" + given + b"tR.",
        "INST": b"(" + given + b"i" + module.encode() + b"\n" + last.encode() + b"\n.",
        "OBJ": b"(" + name(dotted) + given + b"o.",
        "NEWOBJ": b"\x80\2" + name(dotted) + b"(" + given + b"t\x81.",
        "NEWOBJ_EX": b"\x80\4" + name(dotted) + b"(" + given + b"t}\x92.",
        "in a value": state(("a", name(dotted) + b"(" + given + b"tR")),
        "in a tensor": state(("a", tensor(hooks=name(dotted) + b"(" + given + b"tR"))),
        "in a build": b"\x80\2"
        + name("collections.OrderedDict")
        + b")R"
        + name(dotted)
        + b"("
        + given
        + b"tRb.",
        "extension": b"\x80\2\x82\1(" + given + b"tR.",
        "in a persistent id": b"\x80\2" + name(dotted) + b"(" + given + b"tRQ.",
    }


def big_directory(count):
    """Returns a file with a directory of as many entries, all of them alike."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *(0,) * 6, 0, 0, 0, 1, *(0,) * 4, 0, 0) + b"a"
    directory = entry * count
    local = b"PK\3\4" + bytes(26)
    at = len(local)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return local + directory + end64 + locator + end


def deflated(size):
    """Returns a file whose data.pkl unpacks to `size` zeros."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(2**20))
    # The sizes are what the directory says, and it says anything.
    return content.getvalue().replace(struct.pack("<L", 2**20), struct.pack("<L", size))


def overlapping():
    """Returns two files in which two entries of the directory have bytes in common.

    In one a header says that the bytes begin later than they do; in the other two entries have one
    header, which has the name of one of them.
    """
    whole = archive(state(("a", tensor())), {"0": bytes(64), "1": bytes(64)})
    first = whole.index(b"PK\3\4", 4)
    later, same = bytearray(whole), bytearray(whole)
    struct.pack_into("<H", later, first + 28, 8)
    struct.pack_into("<L", same, whole.rindex(b"PK\1\2") + 42, first)
    return bytes(later), bytes(same)


def without_checksum(content):
    """Returns a file whose entries have no checksums, so that a change of the pickle counts."""
    content = bytearray(content)
    at = content.find(b"PK\1\2")
    while at >= 0:
        content[at + 16 : at + 20] = bytes(4)
        at = content.find(b"PK\1\2", at + 4)
    return bytes(content)


def pieces(pickle):
    """Returns the opcodes of a pickle with their arguments."""
    starts = [position for _, _, position in pickletools.genops(pickle)]
    return [pickle[a:b] for a, b in zip(starts, [*starts[1:], len(pickle)], strict=True)]


def ordinary():
    """Returns the pickle and the storages of a small state dict."""
    torch.manual_seed(0)
    values = torch.randn(4, 6)
    shared = {"a": values, "b": values[1:3], "c": torch.nn.Parameter(torch.ones(2).bfloat16())}
    content = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2).state_dict() | shared, content)
    whole = content.getvalue()
    with zipfile.ZipFile(content) as file:
        names = file.namelist()
        prefix = names[0].removesuffix("data.pkl")
        storages = {n.removeprefix(f"{prefix}data/"): file.read(n) for n in names if "/data/" in n}
        return whole, file.read(f"{prefix}data.pkl"), storages


def mutations(seed, count):
    """Yields changed files: bytes of the file, bytes of the pickle, whole opcodes."""
    generator = random.Random(seed)
    whole, pickle, storages = ordinary()
    codes = pieces(pickle)
    extra = [*CODES.values()] + [
        number(generator.choice((-1, 0, 1, 2**31, 2**63, 2**64, -(2**63)))) for _ in range(30)
    ]
    extra += [text(word) for word in ("storage", "0", "a", "\ud800", "torch", "FloatStorage")]
    extra += [name(word) for word in ("os.system", "torch.FloatStorage", "torch.float8_e4m3fn")]
    for _ in range(count):
        kind = generator.randrange(3)
        if kind == 0:
            content = bytearray(without_checksum(whole))
            for _ in range(generator.choice((1, 1, 2, 8))):
                content[generator.randrange(len(content))] = generator.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
                )
            yield bytes(
                content[: generator.choice((len(content), generator.randrange(len(content) + 1)))]
            )
            continue
        if kind == 1:
            changed = bytearray(pickle)
            for _ in range(generator.choice((1, 1, 2, 8))):
                changed[generator.randrange(len(changed))] = generator.randrange(256)
            content = bytes(changed)
        else:
            order = list(codes)
            for _ in range(generator.choice((1, 1, 2, 4))):
                at = generator.randrange(len(order))
                new = generator.choice((generator.choice(codes), generator.choice(extra)))
                change = generator.randrange(3)
                order[at : at + (change != 1)] = [new] if change else []
                if not order:
                    order = list(codes)
            content = b"".join(order)
        yield archive(content, storages, version=b"3\n", byteorder=b"little")
