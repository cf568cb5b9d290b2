"""Mutators: of plain data, of text, of safetensors files. All that they choose comes from the generator they are given."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Iterator
from typing import Any

from peftc.compiler.plan.serial import _digest
from peftc.registry.manager import default_registry

Rng = random.Random
Path = tuple[Any, ...]


def _nested(depth: int, mapping: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


#: Regular expressions that hang, explode or differ between engines.
_PATTERNS = [
    "(a+)+$", "(.*)*x", "(.*.*.*.*.*.*.*.*.*)*!", "^(([a-z_.0-9])+.)+[A-Z]([a-z])+$", "(?:a{1000}){100}",
    "((((((.*)*)*)*)*)*)*#", "(?<=a{1,100000})b", "(" * 200 + ")" * 200, "(?P<idx>x)(?P<idx>y)", "[[a]&&b]", "(?R)",
    "(?i:", "\\", "(?(1)a|b)", "a{,}", "\\1", "(?:x{e<=1})", "\\p{L}+", "(?|a|b)", "a**", "(?#", ".*" * 60 + "!",
]  # fmt: skip
#: Values that no option means.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**25, 10**300, 1e308, -1e-308, 0.5, -0.0, math.nan,
    math.inf, -math.inf, "", " ", "a", "A" * 100_000, "\u0000", "\x1b[31m", "\ud800", "😀" * 50, "\u202eevil", "é",
    "all-linear", "default", "../../x", "/etc/passwd", "~", ".", "..", "a/b", "con", "true", "null", "1e400", "0x10",
    [], {}, [[]], [None], [""], [1, "a", None], {"": 1}, {"a": None}, _nested(70, False), _nested(70, True), ["q"] * 3,
    list(range(2000)), {str(i): i for i in range(2000)}, ["x" * 50] * 500, "__class__", *_PATTERNS,
]  # fmt: skip
#: Pieces of YAML and JSON.
_PIECES = [
    "!!python/object/apply:os.system ['touch pwned']", "&a [*a, *a]", "*a", "<<: *b", "%YAML 1.1\n---\n", "---\n",
    "...\n", "\t", "\r", "\x00", "\ufeff", "{", "}", "[", "]", ":", "- ", "? ", "| ", ">+9\n", "!!binary aGk=",
    "!!set {a}", "&a", '"', "'", "# x\n", "0x" + "F" * 6000, "0o" + "7" * 6000, "1" * 6000, ".inf", "1_000", "0b1",
    "12:30:45", "2001-01-01", "yes", "\\UFFFFFFFF", '"\\UFFFFFFFF"', '"\\ud800"', "\u2028", "\x85", "\n" * 50,
    " " * 500, "a: " * 200, "[" * 500, "{a: " * 500, "- " * 500, "=", "~", "null", "@", "`", "!<tag:x>", "? [a]\n: b\n",
]  # fmt: skip
_WIDTHS = {"BOOL": 1, "U8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4}
_WIDTHS |= {"F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8}


def labels() -> list[str]:
    """Keys that mean something somewhere: options of all methods, sections, and what runs code elsewhere."""
    registry = default_registry()
    options = {name for peft_type in registry.names for name in registry.get(peft_type).config.model_fields}
    others = ["adapters", "base", "version", "train", "checks", "active", "output", "trust_remote_code", "auto_map"]
    return sorted({*options, *others, "runtime_config", "peftc_plugin", "__class__"})


def changed(data: Any, rng: Rng, keys: list[str], values: list[Any] = VALUES, gently: float = 0.0) -> Any:
    """The data with one to five changes of its structure, or by that chance with some that keep its form."""
    if rng.random() < gently:
        return nudged(data, rng)
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5])):
        places = list(_places(data))
        place = rng.choice(places[:60] if rng.random() < 0.5 else places)
        if not place:
            if rng.random() < 0.1:
                return copy.deepcopy(rng.choice(values))
            continue
        _change(data, place, rng, keys, values)
    return data


def nudged(data: Any, rng: Rng) -> Any:
    """The data with one to three changes that keep its form: other numbers, names from elsewhere in it, rows in another
    order, missing or twice. What comes of it gets past whoever looks at types."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = [place for place in _places(data) if place]
        place = rng.choice(places)
        holder = data
        for part in place[:-1]:
            holder = holder[part]
        value = holder[place[-1]]
        if isinstance(value, bool):
            holder[place[-1]] = not value
        elif isinstance(value, int):
            holder[place[-1]] = rng.choice([0, 1, 2, 3, value + 1, max(value - 1, 0), value * 2, 2**31, 2**40, 2**62])
        elif isinstance(value, str):
            texts = [found for at in rng.sample(places, min(8, len(places))) if isinstance(found := _at(data, at), str)]
            holder[place[-1]] = rng.choice(
                [*texts, "", value + "x", value[:-1], value.replace(".", ".0.", 1), "weight"]
            )
        elif isinstance(value, list) and value:
            index = rng.randrange(len(value))
            value[index : index + 1] = rng.choice([[], [value[index]] * 2, [copy.deepcopy(rng.choice(value))]])
            rng.shuffle(value) if rng.random() < 0.2 else None
    return data


def _at(data: Any, place: Path) -> Any:
    for part in place:
        data = data[part]
    return data


def _places(data: Any, here: Path = ()) -> Iterator[Path]:
    yield here
    items = data.items() if isinstance(data, dict) else enumerate(data[:40]) if isinstance(data, list) else ()
    for key, value in items:
        yield from _places(value, (*here, key))


def _change(data: Any, place: Path, rng: Rng, keys: list[str], values: list[Any]) -> None:
    holder = data
    for part in place[:-1]:
        holder = holder[part]
    key = place[-1]
    operation = rng.randrange(10)
    if operation <= 3:
        holder[key] = copy.deepcopy(rng.choice(values))
    elif operation == 4:
        del holder[key]
    elif operation == 5 and isinstance(holder, dict):
        holder[rng.choice([*keys, str(key)[::-1], str(key).upper(), f"{key}s", str(key)[:-1], ""])] = holder.pop(key)
    elif operation == 6 and isinstance(holder, dict):
        holder[rng.choice(keys)] = copy.deepcopy(rng.choice(values))
    elif operation == 7:
        holder[key] = [copy.deepcopy(holder[key])] * rng.choice([1, 2, 50])
    elif operation == 8:
        holder[key] = {rng.choice(keys): copy.deepcopy(holder[key])}
    elif operation == 9:
        holder[key] = _recast(holder[key], rng)


def _recast(value: Any, rng: Rng) -> Any:
    """The same in another type, or another number."""
    if isinstance(value, str):
        return value.split()
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and rng.random() < 0.7:
        return rng.choice([-value, value * 10**6, value + 0.5, float(min(value, 2**60)), str(value)[:40]])
    return str(value)[:1000]


def signed(data: Any) -> Any:
    """A plan whose digest is that of its content: anybody can compute it."""
    if isinstance(data, dict):
        data["digest"] = _digest({key: value for key, value in data.items() if key != "digest"})
    return data


def as_json(data: Any, rng: Rng) -> bytes:
    """JSON text, sometimes with numbers or keys that JSON should not have."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.7, indent=rng.choice([None, 2]))
    choice = rng.random()
    if choice < 0.02:
        text = text.replace("1", "9" * 5000, 1)
    elif choice < 0.04:
        text = text.replace("1", "1e999", 1)
    elif choice < 0.07 and text.startswith("{") and len(text) > 4:
        text = "{" + text[1:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def mangled(raw: bytes, rng: Rng) -> bytes:
    """Text with one to four changes that know nothing of its structure."""
    text = raw.decode("utf-8", "replace")
    for _ in range(rng.choice([1, 1, 2, 4])):
        begin, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        lines = text.split("\n")
        line = rng.randrange(len(lines))
        operation = rng.randrange(8)
        if operation == 0:
            text = text[:begin]
        elif operation <= 3:
            text = text[:begin] + rng.choice(_PIECES) + text[begin:]
        elif operation == 4:
            text = text[:begin] + text[min(end, begin + rng.randrange(1, 40)) :]
        elif operation == 5:
            text = "\n".join([*lines[:line], *[lines[line]] * rng.choice([0, 2, 3, 30]), *lines[line + 1 :]])
        elif operation == 6:
            text = "\n".join(
                [*lines[:line], lines[line].split(":")[0] + ": " + rng.choice(_PIECES), *lines[line + 1 :]]
            )
        else:
            text = (
                text[:begin]
                + chr(rng.choice([0, 9, 10, 13, 27, 34, 92, 127, 133, 0x202E, 0x1F600]))
                + text[begin + 1 :]
            )
    if rng.random() < 0.03:
        return text.encode("utf-16", "surrogatepass")
    return (
        flipped(text.encode("utf-8", "surrogatepass"), rng) if rng.random() < 0.05 else text.encode("utf-8", "replace")
    )


def flipped(raw: bytes, rng: Rng) -> bytes:
    """Bytes with a few of them exchanged."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 3, 50])) if data else ():
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def weights(raw: bytes, rng: Rng, keys: list[str]) -> bytes:
    """A safetensors file whose header or content was changed, consistently or not."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    operation = rng.randrange(12)
    if operation == 0:
        return raw[: rng.randrange(len(raw))]
    if operation == 1:
        return rng.randbytes(8) + raw[8:]
    if operation == 2:
        return flipped(raw, rng)
    if operation == 3:
        return raw + rng.randbytes(5)
    names = [name for name in header if name != "__metadata__"]
    if operation == 4:
        header = changed(header, rng, keys)
    elif operation == 5:
        body = _of_other_dtypes(header, names, rng)
    elif operation == 6 and names:
        shape = header[rng.choice(names)]["shape"]
        number = math.prod(shape)
        shape[:] = rng.choice([[number], [1, number], [1] * 70 + [number], shape[::-1], [number // 2, 2]])
    elif operation == 7:
        _add(header, names, len(body), rng)
    elif operation == 8 and names:
        name = rng.choice(names)
        header[name + rng.choice(["", "x", ".default"])] = header.pop(name)
    elif operation == 9:
        body = (rng.choice([b"\xff", b"\x00", b"\x7f\xc0"]) * len(body))[: len(body)]
    elif operation == 10:
        told = header.get("__metadata__", {})
        for name, text in told.items():
            if text[:1] in ("{", "["):  # facts that are kept as JSON
                told[name] = json.dumps(changed(json.loads(text), rng, keys))
    else:
        header["__metadata__"] = rng.choice([{}, {"a" * 1000: "b" * 10**5}, {"format": "\x1b[2J"}, None, [], {"a": 1}])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _of_other_dtypes(header: dict[str, Any], names: list[str], rng: Rng) -> bytes:
    end = 0
    for name in names:
        code = rng.choice(list(_WIDTHS))
        size = math.prod(header[name]["shape"]) * _WIDTHS[code]
        header[name] |= {"dtype": code, "data_offsets": [end, end + size]}
        end += size
    return rng.randbytes(end)


def _add(header: dict[str, Any], names: list[str], end: int, rng: Rng) -> None:
    name = rng.choice(["x", "base_model.model.x", "é\u0000", "a" * 7000, "../../x", "", *names[:3]])
    shape = rng.choice([[0], [0, 2**40], [2**62, 0], [0, 10**30], [0] * 200, [10**25, 0, 3]])
    header[name + rng.choice(["", "2", ".weight"])] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
