"""The loop around compiled programs, as machine code too: read a piece of each input, compute on it, go on.

A piece fits the processor's cache, so what is read is computed on while it is there. In the interpreter each step
between two pieces would cost as much as the arithmetic, and threads would wait for one another.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from mergekit_px.kernels.native import LANES, address_of

PIECE = 1 << 16
"""Elements that are read and computed at a time. Measured: a quarter and an eighth of it are no faster."""

FILLED = -1
"""In the place of a file: the caller has filled the buffer."""
SCALES = -2
"""In the place of a file: float32 in memory, one for each vector of elements from the origin on."""

SOURCE = np.dtype([(name, np.int64) for name in ("file", "place", "width", "buffer")])
"""Where elements come from: the descriptor of a file, the byte there (or, of scales, the address) of the first one, the
bytes of each, and the address of the buffer of a piece, which has room for a whole vector behind it."""
TASK = np.dtype([(name, np.int64) for name in ("kernel", "output", "width", "numbers", "keys", "maxima", "inputs")])
"""What is computed: the arguments of a kernel. The output begins with the origin's element and has ``width`` bytes for
each; 0 where all pieces add to the same."""

_CLOCKS = getattr(time, "CLOCK_THREAD_CPUTIME_ID", 0), getattr(time, "CLOCK_MONOTONIC", 0)


@cache
def native_loop() -> Callable[..., int]:
    """``(sources, their number, tasks, their number, origin, begin, stop, repeat, pread, clock, spent)`` -> the first
    element that was not computed, since its piece could not be read: ``stop`` if all were.

    Addresses, counts and elements. ``repeat``: 1 fills the last vector with copies of the last element, 0 with zeros.
    ``spent``: two numbers, to which the nanoseconds of processor and of any time for reading are added, if there is a
    ``clock``; see :func:`system_function`. Other threads of the interpreter run meanwhile.
    """
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 11)
    return kind(address_of("run", _ASSEMBLY))


@cache
def system_function(name: str) -> int:
    """The address of a function of the C library; 0 on systems that have it under another name, or not at all."""
    if os.name == "nt":
        return 0
    function: Any = getattr(ctypes.CDLL(None), name, None)
    return ctypes.cast(function, ctypes.c_void_p).value or 0 if function is not None else 0


def _fields(record: np.dtype[Any], table: str, number: str) -> str:
    """Instructions that load all fields of a record of a table under their names."""
    names = record.names or ()
    lines = [f"  %{table}.first = mul i64 {number}, {len(names)}"]
    for place, name in enumerate(names):
        lines += [
            f"  %{table}.{name}.place = add i64 %{table}.first, {place}",
            f"  %{table}.{name}.at = getelementptr i64, ptr %{table}s, i64 %{table}.{name}.place",
            f"  %{table}.{name} = load i64, ptr %{table}.{name}.at",
        ]
    return "\n".join(lines)


_ASSEMBLY = f"""
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define i64 @run(i64 %source_table, i64 %source_count, i64 %task_table, i64 %task_count, i64 %origin, i64 %start,
                i64 %stop, i64 %repeat, i64 %pread_at, i64 %clock_at, i64 %spent_at) {{
entry:
  %sources = inttoptr i64 %source_table to ptr
  %tasks = inttoptr i64 %task_table to ptr
  %pread = inttoptr i64 %pread_at to ptr
  %clock = inttoptr i64 %clock_at to ptr
  %spent = inttoptr i64 %spent_at to ptr
  br label %piece
piece:
  %begin = phi i64 [%start, %entry], [%next_begin, %piece_done]
  %left = sub i64 %stop, %begin
  %is_short = icmp slt i64 %left, {PIECE}
  %count = select i1 %is_short, i64 %left, i64 {PIECE}
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %reading, label %all
reading:
  call void @tick(ptr %clock, ptr %spent, i64 -1)
  br label %source
source:
  %source_number = phi i64 [0, %reading], [%next_source, %source_done]
{_fields(SOURCE, "source", "%source_number")}
  %buffer = inttoptr i64 %source.buffer to ptr
  %source_begin = sub i64 %begin, %origin
  switch i64 %source.file, label %from_file [i64 {FILLED}, label %source_read  i64 {SCALES}, label %from_scales]
from_scales:
  %vector = udiv i64 %source_begin, {LANES}
  %scale_offset = mul i64 %vector, 4
  %scale_at = add i64 %source.place, %scale_offset
  %scales = inttoptr i64 %scale_at to ptr
  %up = add i64 %count, {LANES - 1}
  %vectors = udiv i64 %up, {LANES}
  %scale_bytes = mul i64 %vectors, 4
  call void @llvm.memcpy.p0.p0.i64(ptr %buffer, ptr %scales, i64 %scale_bytes, i1 false)
  br label %source_done
from_file:
  %bytes = mul i64 %count, %source.width
  %offset = mul i64 %begin, %source.width
  %place = add i64 %source.place, %offset
  %is_read = call i1 @read(i64 %source.file, ptr %buffer, i64 %bytes, i64 %place, ptr %pread)
  br i1 %is_read, label %source_read, label %failed
source_read:
  call void @fill(ptr %buffer, i64 %count, i64 %source.width, i64 %repeat)
  br label %source_done
source_done:
  %next_source = add i64 %source_number, 1
  %more_sources = icmp slt i64 %next_source, %source_count
  br i1 %more_sources, label %source, label %computing
computing:
  call void @tick(ptr %clock, ptr %spent, i64 1)
  br label %task
task:
  %task_number = phi i64 [0, %computing], [%next_task, %task]
{_fields(TASK, "task", "%task_number")}
  %task_begin = sub i64 %begin, %origin
  %output_offset = mul i64 %task_begin, %task.width
  %output_at = add i64 %task.output, %output_offset
  %output = inttoptr i64 %output_at to ptr
  %numbers = inttoptr i64 %task.numbers to ptr
  %keys = inttoptr i64 %task.keys to ptr
  %maxima = inttoptr i64 %task.maxima to ptr
  %inputs = inttoptr i64 %task.inputs to ptr
  %kernel = inttoptr i64 %task.kernel to ptr
  call void %kernel(ptr %output, ptr %numbers, ptr %keys, i64 %begin, i64 %count, ptr %maxima, ptr %inputs)
  %next_task = add i64 %task_number, 1
  %more_tasks = icmp slt i64 %next_task, %task_count
  br i1 %more_tasks, label %task, label %piece_done
piece_done:
  %next_begin = add i64 %begin, %count
  br label %piece
failed:
  call void @tick(ptr %clock, ptr %spent, i64 1)
  ret i64 %begin
all:
  ret i64 %stop
}}

; Whether all bytes were there.
define private i1 @read(i64 %file, ptr %buffer, i64 %bytes, i64 %place, ptr %pread) {{
entry:
  %descriptor = trunc i64 %file to i32
  br label %call
call:
  %done = phi i64 [0, %entry], [%next, %more]
  %to = getelementptr i8, ptr %buffer, i64 %done
  %left = sub i64 %bytes, %done
  %from = add i64 %place, %done
  %count = call i64 %pread(i32 %descriptor, ptr %to, i64 %left, i64 %from)
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %more, label %no
more:
  %next = add i64 %done, %count
  %enough = icmp sge i64 %next, %bytes
  br i1 %enough, label %yes, label %call
yes:
  ret i1 true
no:
  ret i1 false
}}

; Fills the rest of the last vector.
define private void @fill(ptr %buffer, i64 %count, i64 %width, i64 %repeat) {{
entry:
  %negative = sub i64 0, %count
  %spare = and i64 %negative, {LANES - 1}
  %spare_bytes = mul i64 %spare, %width
  %bytes = mul i64 %count, %width
  %end = add i64 %bytes, %spare_bytes
  %repeats = icmp ne i64 %repeat, 0
  br label %next
next:
  %place = phi i64 [%bytes, %entry], [%following, %byte]
  %more = icmp slt i64 %place, %end
  br i1 %more, label %byte, label %done
byte:
  %before = sub i64 %place, %width
  %from = getelementptr i8, ptr %buffer, i64 %before
  %copied = load i8, ptr %from
  %value = select i1 %repeats, i8 %copied, i8 0
  %to = getelementptr i8, ptr %buffer, i64 %place
  store i8 %value, ptr %to
  %following = add i64 %place, 1
  br label %next
done:
  ret void
}}

; Adds the time of each clock, or takes it away.
define private void @tick(ptr %clock, ptr %spent, i64 %sign) {{
entry:
  %now = alloca [2 x i64]
  %measures = icmp ne ptr %clock, null
  br i1 %measures, label %read, label %done
read:
  %number = phi i64 [0, %entry], [%next, %read]
  %is_first = icmp eq i64 %number, 0
  %kind = select i1 %is_first, i32 {_CLOCKS[0]}, i32 {_CLOCKS[1]}
  %failed = call i32 %clock(i32 %kind, ptr %now)
  %seconds = load i64, ptr %now
  %rest_at = getelementptr i64, ptr %now, i64 1
  %rest = load i64, ptr %rest_at
  %whole = mul i64 %seconds, 1000000000
  %time = add i64 %whole, %rest
  %signed = mul i64 %time, %sign
  %at = getelementptr i64, ptr %spent, i64 %number
  %before = load i64, ptr %at
  %sum = add i64 %before, %signed
  store i64 %sum, ptr %at
  %next = add i64 %number, 1
  %more = icmp slt i64 %next, 2
  br i1 %more, label %read, label %done
done:
  ret void
}}
"""
