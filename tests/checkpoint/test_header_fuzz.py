"""Whatever the bytes: an error of ours, or a header whose entries tile the data exactly."""

from __future__ import annotations

import json
import math
import os
import re
from random import Random

import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_px.checkpoint.dtypes import DTYPES
from mergekit_px.checkpoint.header import Header, build_header, parse_header
from mergekit_px.errors import MalformedCheckpointError

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)), max_size=6
).map(
    lambda found: [
        (name, dtype, tuple(shape)) for name, (dtype, shape) in found.items() if math.prod(shape) * dtype.bits % 8 == 0
    ]
)
metadata = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def check(raw: bytes, file_size: int) -> Header | None:
    try:
        header = parse_header(raw, file_size, "fuzzed")
    except MalformedCheckpointError as error:
        assert str(error).startswith("fuzzed") and "\n" not in str(error)
        return None
    reached = 0
    for entry in header.entries.values():
        assert entry.begin == reached and (entry.end - entry.begin) * 8 == math.prod(entry.shape) * entry.dtype.bits
        reached = entry.end
    assert header.data_start == 8 + len(raw) and header.data_start + reached == file_size
    return header


@given(tensors, metadata)
def test_round_trip(listing, strings) -> None:
    start, header = build_header(listing, strings)
    assert int.from_bytes(start[:8], "little") == len(start) - 8
    parsed = check(start[8:], len(start) + header.data_size)
    assert parsed == header
    assert {(each.name, each.dtype, each.shape) for each in header.entries.values()} == set(listing)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_arbitrary_bytes(raw, file_size) -> None:
    check(raw, file_size)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4), st.integers(0, 400))
def test_arbitrary_json(document, extra) -> None:
    raw = json.dumps(document).encode()
    check(raw, 8 + len(raw) + extra)


@settings(max_examples=300)
@given(tensors.filter(bool), st.data())
def test_mutated_headers(listing, data) -> None:
    start, header = build_header(listing, {"format": "pt"})
    raw = bytearray(start[8:])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "drop", "repeat", "digit"]))
        if kind == "flip":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "drop" and len(raw) > 1:
            del raw[place]
        elif kind == "repeat":
            raw[place:place] = raw[place : place + 8]
        else:
            raw[place] = data.draw(st.sampled_from(b"0123456789-"))
    check(bytes(raw), 8 + len(raw) + header.data_size + data.draw(st.integers(-2, 2)))


_NUMBERS = ["-0", "0", "1", "4", "-1", "1.0", "1e1", "1e999", "9" * 400, "18446744073709551616", "null", "true"]
_JSON = st.sampled_from(_NUMBERS) | st.integers(1, 200).map(lambda levels: "[" * levels + "]" * levels) | st.just('"x"')


@settings(max_examples=400)
@given(
    st.sampled_from(list(DTYPES)),
    st.lists(st.sampled_from(_NUMBERS[:4]), max_size=3),
    st.sampled_from(["[0,4]", "[-0,4]", "[0,16]", "[0,0]", "[4,8]", "[0.0,4]"]),
    st.none() | _JSON,
    st.sampled_from([0, 4, 16]),
)
def test_what_the_reference_reader_refuses_is_refused(dtype, shape, offsets, unknown, size) -> None:
    extra = "" if unknown is None else f',"x":{unknown}'
    raw = f'{{"w":{{"dtype":"{dtype}","shape":[{",".join(shape)}],"data_offsets":{offsets}{extra}}}}}'.encode()
    if check(raw, 8 + len(raw) + size) is not None:
        safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + bytes(size))


COUNT = int(os.environ.get("PXMERGE_FUZZ_FILES", "3000"))
"""Files of the comparison with the reference reader; 30,000 take half a minute."""

_PIECES = [
    *(b"0", b"-0", b"1", b"-1", b"1.0", b"1e1", b"9" * 30, b"null", b"true", b'""', b"{}", b"[]", b'"F32"', b"\\u0000"),
    *(b"\\ud800", b"\xff", b" ", b"\n", b",", b":", b"[", b"]", b"{", b"}", b'"', b'"dtype":"I8",', b'"shape":[1],'),
    *(b'"__metadata__":{"a":"b"},', b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'),
]


def fuzzed(random: Random) -> tuple[bytes, int]:
    """A header, true or damaged at a few places, and how many bytes follow it."""
    listing = []
    for number in range(random.randrange(4)):
        dtype = random.choice(list(DTYPES.values()))
        shape = tuple(random.randrange(5) for _ in range(random.randrange(4)))
        if math.prod(shape) * dtype.bits % 8 == 0:
            listing.append((random.choice("abé\n") * random.randrange(3) + str(number), dtype, shape))
    start, header = build_header(listing, {"format": "pt"} if random.random() < 0.5 else {})
    raw, size = bytearray(start[8:]), header.data_size
    for _ in range(random.randrange(4)):
        place, end = sorted(random.randrange(len(raw) + 1) for _ in range(2))
        match random.randrange(6):
            case 0:
                raw[place : place + 1] = random.choice(_PIECES)
            case 1:
                raw[place:place] = random.choice(_PIECES)
            case 2:
                del raw[place : min(end, place + 6)]
            case 3:
                raw[place:place] = raw[place : min(end, place + 60)]
            case 4:
                raw = bytearray(re.sub(rb"\d+", lambda _: str(random.randrange(40)).encode(), bytes(raw), count=1))
            case _:
                size = max(0, size + random.randrange(-3, 4))
    return bytes(raw), size


def test_no_file_is_read_otherwise_than_by_the_reference_reader() -> None:
    """Nothing that only pxmerge accepts, and what both accept says the same of every tensor."""
    random, accepted = Random(0), 0
    for _ in range(COUNT):
        raw, size = fuzzed(random)
        header = check(raw, 8 + len(raw) + size)
        if header is None:
            continue
        accepted += 1
        reference = dict(safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + bytes(size)))
        assert reference.keys() == header.entries.keys(), raw
        for name, entry in header.entries.items():
            told = reference[name]
            assert (told["dtype"], tuple(told["shape"])) == (entry.dtype.name, entry.shape), raw
            assert len(told["data"]) == entry.end - entry.begin, raw
    assert COUNT / 10 < accepted < COUNT * 9 / 10
