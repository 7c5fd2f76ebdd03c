"""Safetensors headers, sound and damaged: safetensors' own parser decides which are valid."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import safetensors
from attrs import frozen

from hookcore import CheckpointError
from hookcore.memory import Checkpoint
from hookcore.memory.files.safetensors_header import DTYPES
from hookcore.testing.twins import promise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

_NAMES = (
    "weight",
    "a.b.c",
    "",
    "größe",
    "名前",
    "\U0001f600",
    'qu"ote',
    "back\\slash",
    "new\nline",
    "__metadata__ ",
)
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F64": 8}
_LITERALS = (
    *("-0", "0.0", "1e1", "01", "+1", "1.5", "-1", "NaN", "Infinity", "true", "null", "[]", "{}", '"1"'),
    *("9223372036854775807", "18446744073709551615", "18446744073709551616", "1" + 400 * "0"),
)
_STRINGS = (
    '"\\ud800"',
    '"\\udc00x"',
    '"\\u0000"',
    '"\t"',
    '"\\x41"',
    '"F32\\u0020"',
    '"f32"',
    '"F4"',
    '"C64"',
)
_FILLS = (b"", b" ", b"    ", b"\0", b"\n", b"\xef\xbb\xbf", b"\xff", b"{}", b"x")
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_MOST_CHARACTERS = 5000  # of an error's message


class _File:
    """A file to be: what its header says, as text, and what follows.

    Attributes:
        text: The header.
        data: The bytes after it.
        length: What the file begins with; None for what is true.
    """

    def __init__(self, random: Random) -> None:
        position = 0
        table: dict[str, Any] = {}
        for name in random.sample(_NAMES, random.randint(0, 4)):
            dtype = random.choice(list(_SIZES))
            shape = [random.choice([0, 1, 2, 3]) for _ in range(random.randint(0, 3))]
            nbytes = _SIZES[dtype]
            for size in shape:
                nbytes *= size
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
            position += nbytes
        if random.random() < 0.3:
            table["__metadata__"] = {"format": "pt"}
        items = list(table.items())
        random.shuffle(items)
        self.text = json.dumps(dict(items), ensure_ascii=random.random() < 0.5).encode()
        self.data = random.randbytes(position)
        self.length: int | None = None

    def written(self) -> bytes:
        """All bytes of the file."""
        length = len(self.text) if self.length is None else self.length
        return (length % 2**64).to_bytes(8, "little") + self.text + self.data


# What can be wrong with a file: each damages it in place


def _replace_a_number(file: _File, random: Random) -> None:
    places = [at for at, byte in enumerate(file.text) if chr(byte).isdigit()]
    if places:
        at = random.choice(places)
        file.text = file.text[:at] + random.choice(_LITERALS).encode() + file.text[at + 1 :]


def _move_an_offset(file: _File, random: Random) -> None:
    places = [at for at, byte in enumerate(file.text) if chr(byte).isdigit()]
    if places:
        at = random.choice(places)
        file.text = file.text[:at] + str(random.randint(0, 9)).encode() + file.text[at + 1 :]


def _replace_a_string(file: _File, random: Random) -> None:
    quotes = [at for at, byte in enumerate(file.text) if byte == ord('"')]
    if len(quotes) >= 2:
        first = random.randrange(len(quotes) - 1)
        text = random.choice(_STRINGS).encode()
        file.text = file.text[: quotes[first]] + text + file.text[quotes[first + 1] + 1 :]


def _change_a_byte(file: _File, random: Random) -> None:
    if file.text:
        at = random.randrange(len(file.text))
        file.text = file.text[:at] + random.randbytes(1) + file.text[at + 1 :]


def _leave_out_a_part(file: _File, random: Random) -> None:
    first, last = sorted(random.randint(0, len(file.text)) for _ in range(2))
    file.text = file.text[:first] + file.text[last:]


def _repeat_a_part(file: _File, random: Random) -> None:
    first, last = sorted(random.randint(0, len(file.text)) for _ in range(2))
    file.text = file.text[:last] + file.text[first:]


def _say_it_twice(file: _File, random: Random) -> None:
    inner = file.text.strip()[1:-1]
    file.text = b"{" + inner + b"," + inner + b"}"


def _add_a_field(file: _File, random: Random) -> None:
    places = [at for at, byte in enumerate(file.text) if byte == ord("{")]
    if places:
        at = random.choice(places) + 1
        value = random.choice([*_LITERALS, *_STRINGS])
        file.text = file.text[:at] + f'"extra":{value},'.encode() + file.text[at:]


def _fill_around(file: _File, random: Random) -> None:
    file.text = random.choice(_FILLS) + file.text + random.choice(_FILLS)


def _lie_about_the_length(file: _File, random: Random) -> None:
    near = len(file.text) + random.randint(-3, 3)
    file.length = random.choice([near, 0, 2**63, 2**64 - 1, 100_000_001, 100_000_000])


def _cut_data(file: _File, random: Random) -> None:
    file.data = file.data[: random.randint(0, len(file.data))]


def _add_data(file: _File, random: Random) -> None:
    file.data += random.randbytes(random.randint(1, 9))


def _nest(file: _File, random: Random) -> None:
    depth = random.choice([10, 120, 130, 5000])
    file.text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def _make_it_long(file: _File, random: Random) -> None:
    many = 30_000
    match random.randrange(4):
        case 0:
            file.text = b"{" + b",".join(b'"%d":0' % (at % (many - 1)) for at in range(many)) + b"}"
        case 1:
            sizes = b",".join([b"9223372036854775807"] * many)
            file.text = b'{"a":{"dtype":"U8","shape":[' + sizes + b'],"data_offsets":[0,0]}}'
        case 2:
            file.text = b'{"' + b"k" * 1_000_000 + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,0]}}'
        case 3:
            file.text = b'{"a":{"dtype":"' + b"F" * 1_000_000 + b'","shape":[1],"data_offsets":[0,0]}}'


_DAMAGES: tuple[Callable[[_File, Random], None], ...] = (
    *(
        _replace_a_number,
        _move_an_offset,
        _replace_a_string,
        _change_a_byte,
        _leave_out_a_part,
        _repeat_a_part,
    ),
    *(_say_it_twice, _add_a_field, _fill_around, _lie_about_the_length, _cut_data, _add_data, _nest),
)


@frozen
class Header:
    """One file.

    Attributes:
        seed: Draws it.
    """

    seed: int
    count: ClassVar[int] = 1
    seconds: ClassVar[float] = 20

    def written(self) -> bytes:
        """The bytes of the file."""
        chance = random.Random(self.seed)
        file = _File(chance)
        if self.seed % 500 == 0:
            _make_it_long(file, chance)
        else:
            for damage in chance.choices(_DAMAGES, k=chance.choice([0, 1, 1, 1, 2])):
                damage(file, chance)
        return file.written()

    def check(self) -> None:
        """Opens it with both; they have to agree, but for what is refused on purpose."""
        data = self.written()
        try:
            expected = {name: (it["dtype"], it["shape"]) for name, it in safetensors.deserialize(data)}
        except safetensors.SafetensorError as error:
            expected, reason = None, str(error)
        with tempfile.TemporaryDirectory(prefix="stress-") as folder:
            path = Path(folder, "model.safetensors")
            path.write_bytes(data)
            try:
                entries = Checkpoint.open(path).entries
            except CheckpointError as error:
                promise(len(str(error)) <= _MOST_CHARACTERS, "no message is of many thousand characters")
                if expected is not None and not _may_be_refused(expected, str(error)):
                    raise AssertionError(f"refused a valid file {data[:300]!r}: {error}") from error
            else:
                assert expected is not None, f"accepted {data[:300]!r}, where safetensors says {reason}"
                found = {key: (_NAME_OF[entry.dtype], list(entry.shape)) for key, entry in entries.items()}
                assert found == expected, f"of {data[:300]!r} it finds {found}, not {expected}"


def _may_be_refused(expected: dict[str, tuple[str, list[int]]], why: str) -> bool:
    """Whether it is refused on purpose: types of less than a byte, or one of two tensors would be lost."""
    return "twice" in why or any(dtype.startswith(("F4", "F6")) for dtype, _ in expected.values())


def inputs() -> Iterator[Header]:
    """Yields files."""
    return map(Header, itertools.count())
