"""Random damage to files: structured for JSON, safetensors, pickles and GGUF, or byte by byte.

Every function takes a `random.Random` and changes a file in place; it returns what it did.
"""

import copy
import json
import os
import shutil
import struct
import zipfile

# Placeholders that are replaced after encoding, for what `json.dumps` does not write.
_RAW = {
    "@digits@": "9" * 5000,
    "@deep@": "[" * 5000 + "]" * 5000,
    "@open@": "[" * 100_000,
    "@range@": "1e999",
    "@surrogate@": '"\\ud800"',
    "@zeros@": "0." + "0" * 400 + "1",
}
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**32, 2**63, 2**64),
    *(10**12, -(10**12), float("nan"), float("inf"), float("-inf"), "", "x", "None", "1", "a\0b"),
    *("../../x", "/etc/passwd", "{{ 7*7 }}", "é" * 50, "x" * 100_000, [], {}, [[]], [None], [1, 2]),
    *([1.5, "x"], {"a": 1}, {"": []}, {"a": {"b": {"c": []}}}, [0] * 1000, "(", "[a-", "*", "\n"),
    *_RAW,
)


def _paths(value, at=()):
    """Returns the paths of all values within a value."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value[:20])) if isinstance(value, list) else items
    for key, inner in items:
        found += _paths(inner, (*at, key))
    return found


def _change(rng, content):
    """Changes one value of a JSON document; returns what it did."""
    paths = _paths(content)
    if not paths:
        return "nothing"
    *outer, key = rng.choice(paths)
    parent = content
    for step in outer:
        parent = parent[step]
    where = "/".join(map(str, (*outer, key)))[:60]
    action = rng.choice(("value", "value", "value", "value", "delete", "rename", "add", "wrap"))
    if action == "value":
        parent[key] = copy.deepcopy(rng.choice(VALUES))
        return f"{where} = {parent[key]!r:.40}"
    if action == "delete":
        del parent[key]
    elif action == "wrap":
        parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key])[:1000]))
    elif action == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "../x", str(key).upper(), f"{key}s"))] = parent.pop(key)
    elif isinstance(parent, dict):
        parent[rng.choice(("x", "", "quantization_config", "auto_map", "rope_scaling"))] = (
            copy.deepcopy(rng.choice(VALUES))
        )
    else:
        parent.insert(0, copy.deepcopy(rng.choice(VALUES)))
    return f"{action} {where}"


def encode(rng, content):
    """Returns JSON text, sometimes with a duplicate key."""
    text = json.dumps(content)
    for placeholder, raw in _RAW.items():
        text = text.replace(f'"{placeholder}"', raw)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode()


def damage_json(rng, path):
    """Changes values of a JSON file, or its bytes."""
    if rng.random() < 0.25:
        return damage_bytes(rng, path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # damaged already
        return damage_bytes(rng, path)
    done = [_change(rng, content) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    if rng.random() < 0.03:
        content, done = rng.choice(VALUES), ["another document"]
    path.write_bytes(encode(rng, content))
    return f"{path.name}: {'; '.join(done)}"


def damage_json_lines(rng, path):
    """Changes a line of a file of JSON lines, or its bytes."""
    lines = path.read_bytes().splitlines()
    if rng.random() < 0.3 or not lines:
        return damage_bytes(rng, path)
    number = rng.randrange(len(lines))
    content = json.loads(lines[number])
    done = _change(rng, content)
    lines[number] = encode(rng, content)
    if rng.random() < 0.2:
        lines[number] += rng.choice((b",", b"\r", b"\0", b" {}", b"\xff", b"\n[]"))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"{path.name}:{number + 1}: {done}"


def damage_bytes(rng, path):
    """Flips, removes, inserts or replaces bytes of a file."""
    content = bytearray(path.read_bytes())
    size = len(content)
    action = rng.choice(
        ("flip", "flip", "flip", "cut", "insert", "remove", "noise", "empty", "end")
    )
    at = rng.randrange(size + 1)
    if action == "flip" and size:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            # Headers are at the start.
            content[rng.randrange(rng.choice((size, min(size, 512))))] ^= 1 << rng.randrange(8)
    elif action == "cut":
        del content[at:]
    elif action == "insert":
        content[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 9999, b"\n" * 99))
    elif action == "remove":
        del content[at : at + rng.choice((1, 8, 1000))]
    elif action == "noise":
        content = bytearray(rng.randbytes(rng.choice((1, 7, 8, 100, 5000))))
    elif action == "empty":
        content = bytearray()
    else:
        content += rng.randbytes(rng.choice((1, 8, 100)))
    path.write_bytes(content)
    return f"{path.name}: {action} at {at} of {size} bytes"


def damage_place(rng, path):
    """Replaces a file by a directory, a fifo, a link or nothing."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    action = rng.choice(
        ("nothing", "directory", "fifo", "loop", "broken link", "device", "outside")
    )
    if action == "directory":
        path.mkdir()
    elif action == "fifo":
        os.mkfifo(path)
    elif action != "nothing":
        targets = {"loop": path, "broken link": "absent", "device": "/dev/zero"}
        path.symlink_to(targets.get(action, "/etc/passwd"))
    return f"{path.name}: {action}"


def damage_safetensors(rng, path):
    """Changes the header of a safetensors file, its length, or values of tensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    action = rng.choice(("bytes", "header", "header", "length", "numbers", "rename", "shape"))
    if action == "bytes":
        return damage_bytes(rng, path)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    done = f"{action} {name}"
    if action == "header":
        done = _change(rng, header)
    elif action == "rename":
        header[rng.choice((f"{name}x", "../../x", "", "\0", rng.choice(names)))] = header.pop(name)
    elif action == "shape":
        entry = header[name]
        shapes = [[], [0], [1], entry["shape"][::-1], [2**63], [-1, -1], [2**32, 2**32], "x"]
        entry["shape"] = rng.choice(shapes)
        entry["dtype"] = rng.choice(
            (entry["dtype"], entry["dtype"], "F64", "BOOL", "U8", "F8_E4M3")
        )
    elif action == "numbers":
        begin, end = header[name]["data_offsets"]
        at = rng.randrange(begin, end - 3) & ~3
        data[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38, -1e30)))
    text = encode(rng, header)
    length = len(text)
    if action == "length":
        length = rng.choice((0, 1, length - 1, length + 1, 2**20, 2**40, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return f"{path.name}: {done}"


def damage_gguf(rng, path):
    """Overwrites numbers or bits of a GGUF file, mostly in its header."""
    if rng.random() < 0.3:
        return damage_bytes(rng, path)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(min(len(content), 2200) - 8)
        form, values = rng.choice(
            (("<Q", (0, 1, 2**31, 2**62, 2**64 - 1)), ("<I", (0, 1, 8, 9, 2**31, 2**32 - 1)))
        )
        content[at : at + struct.calcsize(form)] = struct.pack(form, rng.choice(values))
    path.write_bytes(content)
    return f"{path.name}: numbers of the header"


def damage_torch(rng, path, marker):
    """Changes the pickle of a PyTorch file, or replaces it by one that runs a program."""
    if rng.random() < 0.3:
        return damage_bytes(rng, path)
    with zipfile.ZipFile(path) as file:
        members = {name: bytearray(file.read(name)) for name in file.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    action = rng.choice(("pickle", "pickle", "code", "member"))
    if action == "pickle":
        for _ in range(rng.choice((1, 2, 8))):
            members[pickled][rng.randrange(len(members[pickled]))] = rng.randrange(256)
    elif action == "code":
        command = f"touch {marker}".encode()
        module = rng.choice((b"os\nsystem", b"posix\nsystem", b"subprocess\ngetoutput"))
        code = b"\x80\x02c" + module + b"\n(X" + struct.pack("<I", len(command)) + command + b"tR."
        members[pickled] = bytearray(code)
    else:
        del members[rng.choice(list(members))]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, bytes(content))
    return f"{path.name}: {action}"


def noise(rng):
    """Returns text without a grammar."""
    letters = "ab=,.:;()[]{}<>\"'\\/*+?|^$%@#&~`!-_0123456789 \t\n\0é漢\U0001f600\ud800"
    return "".join(rng.choice(letters) for _ in range(rng.choice((1, 3, 10, 40, 2000))))
