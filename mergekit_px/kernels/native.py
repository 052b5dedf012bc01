"""Programs of elementwise arithmetic as machine code: from stored bytes to stored bytes in one pass.

A program (:mod:`~mergekit_px.kernels.tracing`) becomes one loop over vectors: decode the inputs, do the operations,
look whether everything is finite, round once, store. The compiler is LLVM, which comes with ``llvmlite``; without it,
or on a processor that has no fused multiply-add, there is no machine code and torch does the work. The bits are those
of torch's operations on a CPU, one after the other: nothing is contracted, reordered or approximated, and where torch
multiplies and adds with one rounding, so does this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mergekit_px.kernels.random import GAMMA, LAST_SHIFT, ROUNDS
from mergekit_px.kernels.reduction import ROW, pairs_of
from mergekit_px.kernels.tracing import Program, Type

LANES = 16
"""Elements of a vector. Buffers hold whole vectors; what is behind their elements must be finite."""

_STORED = {"BF16": "i16", "F16": "half", "F32": "float", "F64": "double"}
"""Storage type -> what LLVM takes its elements for."""
STORED = frozenset(_STORED)
"""Storage types that are decoded and encoded here."""
CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
"""Storage types of one byte that are decoded here; integers only where a scale goes with them."""
LOADED = STORED | CODES - {"I8"}
"""Storage types that are decoded here."""

# Names of integers of the same width, and of intrinsics, in LLVM's language.
_BITS: dict[Type, str] = {"float": "i32", "double": "i64"}
_MAGNITUDE: dict[Type, int] = {"float": 2**31 - 1, "double": 2**63 - 1}
_SUFFIX: dict[Type, str] = {"float": "f32", "double": "f64"}


@dataclass(frozen=True, slots=True)
class Counting:
    """In the place of a storage type: count the digits of magnitudes instead of storing a value.

    What is counted is the magnitude's bits from ``shift`` on, less a prefix, if that is below ``size``: one of the
    program's ``results``, for each of which its keys end with a prefix (shifted too). The output is ``size + 1``
    32-bit counters for each; the last one is for what is not counted.
    """

    results: tuple[int, ...]
    shift: int
    size: int


@dataclass(frozen=True, slots=True)
class Summing:
    """In the place of a storage type: add the products of all pairs of the program's ``results`` in float64.

    The output is :data:`~mergekit_px.kernels.reduction.ROW` sums for each pair, to which one row of elements after
    another is added.
    """

    results: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled program.

    Attributes:
        address: of a function of ``(output, numbers, keys, first element, elements, maxima, inputs)``: addresses but
            for the two counts. The first element is even, and ``inputs`` holds the address of each. ``maxima`` are
            raised to the bits of the largest magnitude of all inputs and of that of the result, in the type of the
            program.
        limit: maxima of finite values are below it.
    """

    address: int
    limit: int


@cache
def is_available() -> bool:
    """Whether programs can be compiled here."""
    try:
        return _machine() is not None
    except (ImportError, OSError, RuntimeError):
        return False


_kernels: dict[Any, Kernel] = {}
_lock = threading.RLock()
"""Of the compiler."""
_engines: list[Any] = []
"""What holds the code, until the process ends: an engine that is freed takes the compiler with it."""


def compiled(program: Program, output: str | Counting | Summing) -> Kernel:
    """The code of a program whose result is stored as ``output``, a safetensors type of :data:`STORED`, or what is
    counted or summed instead."""
    key = (program.structure, output)
    with _lock:
        if key not in _kernels:
            _kernels[key] = _compiled(program, output)
        return _kernels[key]


@cache
def _machine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    triple = binding.get_process_triple()
    if triple.startswith("x86_64"):
        if not (features.get("fma") and features.get("avx2") and features.get("f16c")):
            return None
    elif not triple.startswith(("aarch64", "arm64")):
        return None
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3)


def address_of(name: str, assembly: str) -> int:
    """The address of a function of a module in LLVM's language, which is compiled now."""
    from llvmlite import binding

    with _lock:
        engine = binding.create_mcjit_compiler(binding.parse_assembly(assembly), _machine())
        engine.finalize_object()
        _engines.append(engine)
    return int(engine.get_function_address(name))


def _compiled(program: Program, output: str | Counting | Summing) -> Kernel:
    limit = 0x7F800000 if program.type == "float" else 0x7FF0000000000000
    return Kernel(address_of("merge", _assembly(program, output)), limit)


class _Code:
    """Instructions in order, in LLVM's language; values have names that begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.lines: list[str] = []
        self._prefix = prefix

    def put(self, instruction: str) -> str:
        """An instruction's value."""
        name = f"%{self._prefix}{len(self.lines)}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """An instruction without a value."""
        self.lines.append(f"  {instruction}")


def _assembly(program: Program, output: str | Counting | Summing) -> str:
    """The program as a function in LLVM's language."""
    kind = program.type
    bits = _vector(_BITS[kind])
    entry, loop, end = _Code("before"), _Code("each"), _Code("after")
    for number in range(len(program.inputs)):
        entry.lines.append(f"  %slot{number} = getelementptr ptr, ptr %inputs, i64 {number}")
        entry.lines.append(f"  %in{number} = load ptr, ptr %slot{number}")
    values: list[str] = []
    read = "%read"
    for name, made, operands in program.operations:
        if name == "input":
            value = _decoded(loop, program.inputs[operands[0]], f"%in{operands[0]}", kind)
            read = _larger(loop, read, value, kind)
        elif name == "scaled":
            codes, scales = (f"%in{number}" for number in operands)
            value = _scaled(loop, program.inputs[operands[0]], codes, scales, kind)
            read = _larger(loop, read, value, kind)
        elif name == "number":
            value = _number(entry, operands[0], made)
        elif name == "uniform":
            value = _uniform(entry, loop, operands[0])
        else:
            sources = [(values[place], program.operations[place][1]) for place in operands]
            value = _operation(loop, name, made, sources)
        values.append(value)
    result = "%made"
    if isinstance(output, Counting):
        for number, place in enumerate(output.results):
            _count(entry, loop, output, number, len(program.keys) + number, values[place])
    elif isinstance(output, Summing):
        _sum_products(loop, [values[place] for place in output.results])
    else:
        result = _larger(loop, result, values[program.result], kind)
        _encode(loop, output, values[program.result], kind)
    for place, largest in enumerate((read, result)):
        element = _BITS[kind]
        scalar = end.put(f"call {element} @llvm.vector.reduce.umax.v{LANES}{element}({bits} {largest})")
        address = end.put(f"getelementptr {element}, ptr %maxima, i64 {place}")
        before = end.put(f"load {element}, ptr {address}")
        more = end.put(f"icmp ugt {element} {scalar}, {before}")
        end.do(f"store {element} {end.put(f'select i1 {more}, {element} {scalar}, {element} {before}')}, ptr {address}")
    return "\n".join(
        [
            "define void @merge(ptr noalias %out, ptr noalias %numbers, ptr noalias %keys, i64 %start, i64 %count,"
            " ptr noalias %maxima, ptr noalias %inputs) {",
            "entry:",
            *entry.lines,
            "  br label %loop",
            "loop:",
            "  %place = phi i64 [0, %entry], [%next, %last]",
            f"  %read = phi {bits} [zeroinitializer, %entry], [{read}, %last]",
            f"  %made = phi {bits} [zeroinitializer, %entry], [{result}, %last]",
            *loop.lines,
            "  br label %last",
            "last:",
            f"  %next = add i64 %place, {LANES}",
            "  %more = icmp ult i64 %next, %count",
            "  br i1 %more, label %loop, label %end",
            "end:",
            *end.lines,
            "  ret void",
            "}",
            *_declarations(),
        ]
    )


def _vector(element: str, lanes: int = LANES) -> str:
    return f"<{lanes} x {element}>"


def _all(element: str, value: object, lanes: int = LANES) -> str:
    """A constant vector of one value."""
    return f"<{', '.join([f'{element} {value}'] * lanes)}>"


def _declarations() -> Iterator[str]:
    for kind, suffix in _SUFFIX.items():
        vector, element = _vector(kind), _BITS[kind]
        yield f"declare {vector} @llvm.fma.v{LANES}{suffix}({vector}, {vector}, {vector})"
        yield f"declare {vector} @llvm.fabs.v{LANES}{suffix}({vector})"
        yield f"declare {_vector(element)} @llvm.umax.v{LANES}{element}({_vector(element)}, {_vector(element)})"
        yield f"declare {element} @llvm.vector.reduce.umax.v{LANES}{element}({_vector(element)})"


def _number(entry: _Code, number: int, kind: Type) -> str:
    address = entry.put(f"getelementptr double, ptr %numbers, i64 {number}")
    scalar = entry.put(f"load double, ptr {address}")
    if kind == "float":
        scalar = entry.put(f"fptrunc double {scalar} to float")
    return _spread(entry, kind, scalar)


def _spread(entry: _Code, element: str, scalar: str, lanes: int = LANES) -> str:
    vector = _vector(element, lanes)
    first = entry.put(f"insertelement {vector} poison, {element} {scalar}, i32 0")
    return entry.put(f"shufflevector {vector} {first}, {vector} poison, {_vector('i32', lanes)} zeroinitializer")


def _scaled(loop: _Code, dtype: str, codes: str, scales: str, kind: Type) -> str:
    """Codes times the scale of their vector, in float32 as everywhere."""
    value = _decoded(loop, dtype, codes, "float")
    place = loop.put(f"udiv i64 %place, {LANES}")
    scale = loop.put(f"load float, ptr {loop.put(f'getelementptr float, ptr {scales}, i64 {place}')}")
    value = loop.put(f"fmul {_vector('float')} {value}, {_spread(loop, 'float', scale)}")
    return value if kind == "float" else loop.put(f"fpext {_vector('float')} {value} to {_vector(kind)}")


def _decoded_code(loop: _Code, dtype: str, base: str) -> str:
    """Codes of one byte, in float32. Floats go through half precision, whose exponents hold theirs."""
    byte, word, half, single = _vector("i8"), _vector("i16"), _vector("half"), _vector("float")
    address = loop.put(f"getelementptr i8, ptr {base}, i64 %place")
    code = loop.put(f"load {byte}, ptr {address}, align 1")
    if dtype == "I8":
        return loop.put(f"sitofp {byte} {code} to {single}")
    wide = loop.put(f"zext {byte} {code} to {word}")
    wide = loop.put(f"shl {word} {wide}, {_all('i16', 8)}")
    if dtype == "F8_E5M2":
        return loop.put(f"fpext {half} {loop.put(f'bitcast {word} {wide} to {half}')} to {single}")
    # E4M3: a bias of 7 in the place of 15, and all ones for what is no number.
    sign = loop.put(f"and {word} {wide}, {_all('i16', -0x8000)}")
    magnitude = loop.put(f"and {word} {wide}, {_all('i16', 0x7F00)}")
    moved = loop.put(f"lshr {word} {magnitude}, {_all('i16', 1)}")
    moved = loop.put(f"or {word} {sign}, {moved}")
    value = loop.put(f"fpext {half} {loop.put(f'bitcast {word} {moved} to {half}')} to {single}")
    value = loop.put(f"fmul {single} {value}, {_all('float', '256.0')}")
    none = loop.put(f"icmp eq {word} {magnitude}, {_all('i16', 0x7F00)}")
    return loop.put(f"select {_vector('i1')} {none}, {single} {_all('float', '0x7FF8000000000000')}, {single} {value}")


def _decoded(loop: _Code, dtype: str, base: str, kind: Type) -> str:
    if dtype in CODES:
        value = _decoded_code(loop, dtype, base)
        return value if kind == "float" else loop.put(f"fpext {_vector('float')} {value} to {_vector(kind)}")
    element = _STORED[dtype]
    address = loop.put(f"getelementptr {element}, ptr {base}, i64 %place")
    value = loop.put(f"load {_vector(element)}, ptr {address}, align 2")
    if dtype == "BF16":
        wide = loop.put(f"zext {_vector('i16')} {value} to {_vector('i32')}")
        high = loop.put(f"shl {_vector('i32')} {wide}, {_all('i32', 16)}")
        value, element = loop.put(f"bitcast {_vector('i32')} {high} to {_vector('float')}"), "float"
    if element == kind:
        return value
    return loop.put(f"fpext {_vector(element)} {value} to {_vector(kind)}")


def _encode(loop: _Code, dtype: str, value: str, kind: Type) -> None:
    if kind == "double" and dtype != "F64":  # torch rounds to float32 on the way to a narrower type
        value, kind = loop.put(f"fptrunc {_vector('double')} {value} to {_vector('float')}"), "float"
    element = _STORED[dtype]
    if dtype == "BF16":
        whole = _vector("i32")
        bits = loop.put(f"bitcast {_vector('float')} {value} to {whole}")
        high = loop.put(f"lshr {whole} {bits}, {_all('i32', 16)}")
        odd = loop.put(f"and {whole} {high}, {_all('i32', 1)}")
        up = loop.put(f"add {whole} {bits}, {_all('i32', 0x7FFF)}")
        rounded = loop.put(f"add {whole} {up}, {odd}")
        kept = loop.put(f"lshr {whole} {rounded}, {_all('i32', 16)}")
        value = loop.put(f"trunc {whole} {kept} to {_vector('i16')}")
    elif element != kind:
        operation = "fptrunc" if element == "half" else "fpext"
        value = loop.put(f"{operation} {_vector(kind)} {value} to {_vector(element)}")
    address = loop.put(f"getelementptr {element}, ptr %out, i64 %place")
    loop.do(f"store {_vector(element)} {value}, ptr {address}, align 2")


def _count(entry: _Code, loop: _Code, output: Counting, number: int, key: int, value: str) -> None:
    """Count the digits of magnitudes; vectors of which nothing is counted, which most are as a rule, cost no more."""
    vector, whole = _vector("float"), _vector("i32")
    scalar = entry.put(f"load i64, ptr {entry.put(f'getelementptr i64, ptr %keys, i64 {key}')}")
    prefix = _spread(entry, "i32", entry.put(f"trunc i64 {scalar} to i32"))
    entry.lines.append(f"  %places{number} = alloca {whole}, align 64")
    bits = loop.put(f"bitcast {vector} {value} to {whole}")
    magnitude = loop.put(f"and {whole} {bits}, {_all('i32', _MAGNITUDE['float'])}")
    shifted = loop.put(f"lshr {whole} {magnitude}, {_all('i32', output.shift)}")
    digits = loop.put(f"sub {whole} {shifted}, {prefix}")
    counted = loop.put(f"icmp ult {whole} {digits}, {_all('i32', output.size)}")
    some = loop.put(f"bitcast {_vector('i1')} {counted} to i{LANES}")
    loop.do(f"br i1 {loop.put(f'icmp eq i{LANES} {some}, 0')}, label %counted{number}, label %count{number}")
    loop.lines.append(f"count{number}:")
    places = loop.put(f"select {_vector('i1')} {counted}, {whole} {digits}, {whole} {_all('i32', output.size)}")
    # Through memory: taken out of its register, each element took ten times as long on a processor with AVX-512.
    loop.do(f"store volatile {whole} {places}, ptr %places{number}, align 64")
    first = number * (output.size + 1)
    for lane in range(LANES):
        element = loop.put(f"load i32, ptr {loop.put(f'getelementptr i32, ptr %places{number}, i64 {lane}')}")
        place = loop.put(f"zext i32 {element} to i64")
        counter = loop.put(f"getelementptr i32, ptr %out, i64 {loop.put(f'add i64 {place}, {first}')}")
        count = loop.put(f"load i32, ptr {counter}")
        loop.do(f"store i32 {loop.put(f'add i32 {count}, 1')}, ptr {counter}")
    loop.do(f"br label %counted{number}")
    loop.lines.append(f"counted{number}:")


def _sum_products(loop: _Code, values: Sequence[str]) -> None:
    """Add the products of pairs of float32 values, which float64 holds exactly, to the sums of their place in a row."""
    vector = _vector("double")
    doubles = [loop.put(f"fpext {_vector('float')} {value} to {vector}") for value in values]
    lane = loop.put(f"and i64 %place, {ROW - 1}")
    for pair, (row, column) in enumerate(pairs_of(len(values))):
        address = loop.put(f"getelementptr double, ptr %out, i64 {loop.put(f'add i64 {lane}, {pair * ROW}')}")
        total = loop.put(f"load {vector}, ptr {address}, align 8")
        product = loop.put(f"fmul {vector} {doubles[row]}, {doubles[column]}")
        loop.do(f"store {vector} {loop.put(f'fadd {vector} {total}, {product}')}, ptr {address}, align 8")


def _larger(loop: _Code, largest: str, value: str, kind: Type) -> str:
    """The larger of each lane's largest magnitude so far and that of a value, as bits."""
    element = _BITS[kind]
    vector = _vector(element)
    bits = loop.put(f"bitcast {_vector(kind)} {value} to {vector}")
    magnitude = loop.put(f"and {vector} {bits}, {_all(element, _MAGNITUDE[kind])}")
    return loop.put(f"call {vector} @llvm.umax.v{LANES}{element}({vector} {largest}, {vector} {magnitude})")


def _operation(loop: _Code, name: str, made: Type, sources: Sequence[tuple[str, Type]]) -> str:
    """One operation on vectors, with torch's meaning of it."""
    values = [value for value, _ in sources]
    kind = sources[0][1]
    vector, truth = _vector(kind), _vector("i1")

    def compare(relation: str, left: str, right: str) -> str:
        return loop.put(f"fcmp {relation} {vector} {left}, {right}")

    def choose(condition: str, chosen: str, other: str, among: Type = kind) -> str:
        return loop.put(f"select {truth} {condition}, {_vector(among)} {chosen}, {_vector(among)} {other}")

    if name in ("fadd", "fsub", "fmul", "fdiv"):
        return loop.put(f"{name} {vector} {values[0]}, {values[1]}")
    if name == "fma":
        operands = ", ".join(f"{vector} {value}" for value in values)
        return loop.put(f"call {vector} @llvm.fma.v{LANES}{_SUFFIX[kind]}({operands})")
    if name == "fneg":
        return loop.put(f"fneg {vector} {values[0]}")
    if name == "fabs":
        return loop.put(f"call {vector} @llvm.fabs.v{LANES}{_SUFFIX[kind]}({vector} {values[0]})")
    if name in ("ogt", "oge", "olt", "ole"):
        return compare(name, *values)
    zero = _all(kind, "0.0")
    if name == "sign":
        negative = choose(compare("olt", values[0], zero), _all(kind, "-1.0"), zero)
        return choose(compare("ogt", values[0], zero), _all(kind, "1.0"), negative)
    if name in ("maximum", "minimum"):
        return choose(compare("ogt" if name == "maximum" else "olt", *values), values[0], values[1])
    if name in ("atleast", "atmost"):
        value, bound = values
        return choose(compare("olt" if name == "atleast" else "ogt", value, bound), bound, value)
    if name == "hardshrink":
        value, cut = values
        below = compare("olt", value, loop.put(f"fneg {vector} {cut}"))
        return choose(loop.put(f"or {truth} {below}, {compare('ogt', value, cut)}"), value, zero)
    if name == "threshold":
        value, cut, instead = values
        return choose(compare("ole", value, cut), instead, value)
    if name == "where":
        return choose(values[0], values[1], values[2], made)
    if name == "convert":
        if kind == "bool":
            return choose(values[0], _all(made, "1.0"), _all(made, "0.0"), made)
        return loop.put(f"{'fpext' if made == 'double' else 'fptrunc'} {vector} {values[0]} to {_vector(made)}")
    raise ValueError(f"no operation {name}")


def _uniform(entry: _Code, loop: _Code, number: int) -> str:
    """Random numbers: each word of the generator serves two neighbouring elements."""
    words = LANES // 2
    vector = _vector("i64", words)
    key = entry.put(f"load i64, ptr {entry.put(f'getelementptr i64, ptr %keys, i64 {number}')}")
    keys = _spread(entry, "i64", key, words)
    element = loop.put("add i64 %start, %place")
    first = loop.put(f"lshr i64 {element}, 1")
    firsts = _spread(loop, "i64", first, words)
    counters = loop.put(f"add {vector} {firsts}, <{', '.join(f'i64 {word}' for word in range(words))}>")

    def combine(operation: str, left: str, right: str) -> str:
        return loop.put(f"{operation} {vector} {left}, {right}")

    def constant(value: int) -> str:
        return _all("i64", value, words)

    word = combine("add", combine("mul", counters, constant(GAMMA)), keys)
    for shift, multiplier in ROUNDS:
        word = combine("mul", combine("xor", word, combine("lshr", word, constant(shift))), constant(multiplier))
    word = combine("xor", word, combine("lshr", word, constant(LAST_SHIFT)))
    halves = loop.put(f"bitcast {vector} {word} to {_vector('i32')}")
    low = loop.put(f"and {_vector('i32')} {halves}, {_all('i32', 2**24 - 1)}")
    value = loop.put(f"uitofp {_vector('i32')} {low} to {_vector('float')}")
    return loop.put(f"fmul {_vector('float')} {value}, {_all('float', '0x3E70000000000000')}")
