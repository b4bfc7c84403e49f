"""A small interpreter of PTX, so that what Triton compiles for NVIDIA GPUs can be run, slowly, where there is none.

One thread block at a time, all threads in lockstep on numpy arrays. Branches must go the same way in every thread.
It knows the instructions that the kernels of this project use and raises :class:`UnknownInstructionError` at any other.
Loads and stores must hit registered memory and be aligned to their size. ``rsqrt.approx`` answers up to one unit in the
last place too high or too low, at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from zoengine.noise.reference import fma as fma_f32

_INTEGER = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,

}  # fmt: skip
_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert}


class UnknownInstructionError(NotImplementedError):
    """An instruction this interpreter does not know."""


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(re.search(r"\d+", kind).group())


def typed(raw: np.ndarray, kind: str) -> np.ndarray:
    """Raw register bits as numbers of PTX type ``kind`` (bf16 and fp16 as float32)."""
    if kind == "pred":
        return raw.astype(bool)
    raw = raw.astype(_INTEGER[bits_of(kind)])
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view({"f": f"f{bits_of(kind) // 8}", "s": f"i{bits_of(kind) // 8}"}.get(kind[0], raw.dtype))


def raw_of(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of :func:`typed`, rounding to nearest."""
    if kind == "pred":
        return value.astype(bool)
    if kind in ("bf16", "f16"):  # numpy has no bf16
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        return torch.from_numpy(np.ascontiguousarray(value)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    if kind[0] == "f":
        return np.ascontiguousarray(value).view(_INTEGER[bits_of(kind)])
    return value.astype(_INTEGER[bits_of(kind)])


class Memory:
    """Global memory: tensors at the addresses they have."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.areas = [(t.data_ptr(), t.view(-1).view(torch.uint8).numpy()) for t in tensors if t.numel()]

    def place(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The area that holds all ``addresses`` and the positions of their ``size`` bytes in it."""
        assert not (addresses % np.uint64(size)).any(), f"misaligned access of {size} bytes"
        for base, area in self.areas:
            start = addresses.astype(np.int64) - base
            if (start >= 0).all() and (start + size <= area.size).all():
                return area, start[:, None] + np.arange(size)
        raise IndexError("access outside of the tensors")


class Block:
    """Runs a kernel: ``ptx`` is its text, ``arguments`` its parameters in order, integers or tensors or None."""

    def __init__(
        self, ptx: str, arguments: Sequence, tensors: Sequence[torch.Tensor], grid: Sequence[int], threads: int
    ) -> None:
        self.threads = threads
        self.grid = grid
        self.memory = Memory(tensors)
        self.shared = np.zeros(1 << 16, dtype=np.uint8)
        self.random = np.random.default_rng(0)
        self.parameters = [a.data_ptr() if isinstance(a, torch.Tensor) else int(a or 0) for a in arguments]
        text = re.split(r"^\t\.(?:file|section)", ptx[ptx.index("\n{", ptx.index(".entry")) :], maxsplit=1, flags=re.M)[
            0
        ]
        text = re.sub(r"//[^\n]*|^\s*\.(?:loc|reg|pragma)[^\n;]*;?|\.reg [^;]*;", "", text, flags=re.M)
        text = re.sub(r"^(\$\w+):", r"\1: ;", text, flags=re.M)
        self.program, self.labels = [], {}
        for statement in re.split(r"[;]", text):
            statement = re.sub(r"^[\s{}]+", "", statement).strip()
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.program)
            elif statement:
                guard, name, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", statement, re.S).groups()
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                self.program.append((guard, name, operands))

    def run(self, program_id: Sequence[int]) -> None:
        """Run the block with this place in the grid."""
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(self.threads, dtype=np.uint32),
            "global_smem": np.zeros(self.threads, np.uint64),
        }
        for axis, place, size in zip("xyz", program_id, self.grid, strict=False):
            self.registers[f"%ctaid.{axis}"] = np.full(self.threads, place, np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.threads, size, np.uint32)
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.program):
                guard, name, operands = self.program[at]
                active = np.ones(self.threads, bool)
                if guard:
                    active = self.registers[guard.lstrip("!")] ^ guard.startswith("!")
                at += 1
                if name.startswith(("bra", "ret")):
                    assert active.all() or not active.any(), "threads part ways"
                    if active.all():
                        at = self.labels[operands[0]] if name.startswith("bra") else len(self.program)
                elif not name.startswith("bar"):
                    self.step(name.split("."), operands, active)

    def value(self, operand: str, kind: str) -> np.ndarray:
        if operand in self.registers:
            return typed(self.registers[operand], kind)
        if operand.startswith("%"):  # never written: the compiler means any value
            raw = 0xDEADBEEFDEADBEEF
        elif operand.startswith(("0f", "0d")):
            raw = int(operand[2:], 16)
        else:
            raw = int(operand.rstrip("U"), 0)
        return typed(np.full(self.threads, raw & (1 << max(bits_of(kind), 8)) - 1, np.uint64), kind)

    def set(self, operand: str, value: np.ndarray, kind: str, active: np.ndarray) -> None:
        new = raw_of(value, kind)
        old = self.registers.get(operand)
        self.registers[operand] = new if active.all() or old is None else np.where(active, new, old)

    def step(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        op, kind, out = name[0], name[-1], operands[0]
        inputs = operands[1:]
        if op in ("ld", "st"):
            return self.access(name, operands, active)
        if op in ("red", "atom"):
            return self.add_atomically(name, operands, active)
        if op == "ldmatrix":
            return self.load_matrices(name, operands, active)
        if op == "mov" and "{" in "".join(operands):
            return self.pack(int(kind[1:]), out, inputs[0], active)
        if op == "cvt":
            return self.convert(name, operands, active)
        if op == "setp":
            return self.compare(name[1], kind, operands, active)
        if op == "prmt":
            low, high, selector = (self.value(x, "u32") for x in inputs)
            both = (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)).view(np.uint8).reshape(-1, 8)
            result = [both[np.arange(self.threads), selector >> np.uint32(4 * k) & 7] for k in range(4)]
            result = np.stack(result, 1).copy().view(np.uint32)[:, 0]
        elif op == "selp":
            result = np.where(self.value(inputs[2], "pred"), *(self.value(x, kind) for x in inputs[:2]))
        elif op == "shfl":
            assert name[2] == "bfly"
            result = self.value(inputs[0], kind)[np.arange(self.threads) ^ int(inputs[1])]
        elif op == "fma" and kind == "f64":  # only used where the product is exact
            a, b, c = (self.value(x, kind) for x in inputs)
            result = a * b + c
        elif op == "fma":
            result = fma_f32(*(torch.from_numpy(self.value(x, kind).copy()) for x in inputs)).numpy()
        elif op in ("mul", "mad") and name[1] in ("wide", "lo"):
            a, b = (self.value(x, kind) for x in inputs[:2])
            if name[1] == "wide":
                kind = f"{kind[0]}{2 * bits_of(kind)}"
                a, b = (v.astype({"u": np.uint64, "s": np.int64}[kind[0]]) for v in (a, b))
            result = a * b + (self.value(inputs[2], kind) if op == "mad" else 0)
        elif op in ("shl", "shr"):
            shift = self.value(inputs[1], "u32").astype(np.int64)
            a = self.value(inputs[0], kind)
            amount = np.minimum(shift, bits_of(kind) - 1).astype(a.dtype)
            moved = a << amount if op == "shl" else a >> amount
            result = np.where((shift >= bits_of(kind)) & (kind[0] != "s"), 0, moved).astype(a.dtype)
        elif op == "bfe":
            a, start, length = self.value(inputs[0], kind), int(inputs[1]), int(inputs[2])
            result = a << a.dtype.type(bits_of(kind) - start - length) >> a.dtype.type(bits_of(kind) - length)
        elif op == "rsqrt":
            exact = (1 / np.sqrt(self.value(inputs[0], "f32").astype(np.float64))).astype(np.float32)
            result = (exact.view(np.int32) + self.random.integers(-1, 2, self.threads, np.int32)).view(np.float32)
        elif op == "sqrt":
            assert name[1] == "rn"
            result = np.sqrt(self.value(inputs[0], kind))
        elif op == "div" and kind[0] == "f":
            assert name[1] == "rn"
            result = self.value(inputs[0], kind) / self.value(inputs[1], kind)
        elif op in ("rem", "div"):
            a, b = (self.value(x, kind) for x in inputs)
            result = np.fmod(a, b) if op == "rem" else (a - np.fmod(a, b)) // b  # towards zero
        elif op in _BINARY:
            result = _BINARY[op](*(self.value(x, kind) for x in inputs))
        elif op == "mov":
            result = self.value(inputs[0], kind)
        elif op in _UNARY:
            result = _UNARY[op](self.value(inputs[0], kind))
        else:
            raise UnknownInstructionError(".".join(name))
        self.set(out, result, kind, active)

    def access(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        space, kind = name[1], name[-1]
        place, data = (operands[1], operands[0]) if name[0] == "ld" else (operands[0], operands[1])
        registers = data.strip("{} ").replace(",", " ").split()
        if space == "param":
            number = int(re.search(r"param_(\d+)", place).group(1))
            value = self.parameters[number] if number < len(self.parameters) else 0
            return self.set(registers[0], self.value(str(value), kind), kind, active)
        if not active.any():
            return None
        base, _, more = place.strip("[] ").partition("+")
        addresses = (self.value(base.strip(), "u64") + np.uint64(int(more or 0)))[active]
        size = bits_of(kind) // 8
        if space == "shared":
            area, where = self.shared, addresses.astype(np.int64)[:, None] + np.arange(size * len(registers))
        else:
            area, where = self.memory.place(addresses, size * len(registers))
        if name[0] == "st":
            values = [raw_of(self.value(r, kind), kind)[active] for r in registers]
            area[where] = np.ascontiguousarray(np.stack(values, 1)).view(np.uint8)
            return None
        values = np.ascontiguousarray(area[where]).view(_INTEGER[bits_of(kind)])
        for k, register in enumerate(registers):
            value = np.zeros(self.threads, values.dtype)
            value[active] = values[:, k]
            self.set(register, value, f"b{bits_of(kind)}", active)
        return None

    def add_atomically(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        """``red.global.gpu.relaxed.add.u64 [a], b``, or ``atom`` with a register for what was there; in turn."""
        kind, before = name[-1], None
        assert name[1] == "global" and name[-2] == "add" and kind[0] in "us"
        if name[0] == "atom":
            before, *operands = operands
        if active.any():
            base, _, more = operands[0].strip("[] ").partition("+")
            addresses = (self.value(base.strip(), "u64") + np.uint64(int(more or 0)))[active]
            area, where = self.memory.place(addresses, bits_of(kind) // 8)
            values = self.value(operands[1], kind)[active]
            found = np.zeros(self.threads, dtype=values.dtype)
            for thread, at, value in zip(active.nonzero()[0], where, values, strict=True):
                found[thread] = area[at].view(values.dtype)[0]
                area[at] = (area[at].view(values.dtype) + value).view(np.uint8)
            if before is not None:
                self.set(before, found, kind, active)

    def load_matrices(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        """``ldmatrix.sync.aligned.m8n8.x4.shared.b16 {a, b, c, d}, [e]``: thread 8 m + r of a warp has the address of
        row r of matrix m, 16 bytes; thread l gets bytes ``4 (l % 4) ...`` of row l / 4 of each matrix."""
        assert name[3] == "m8n8" and name[-2:] == ["shared", "b16"] and "trans" not in name and active.all()
        base, _, more = operands[1].strip("[] ").partition("+")
        addresses = self.value(base.strip(), "u32").astype(np.int64) + int(more or 0)
        lane = np.arange(self.threads) % 32
        for m, register in enumerate(operands[0].strip("{} ").replace(",", " ").split()):
            rows = addresses[np.arange(self.threads) - lane + 8 * m + lane // 4] + 4 * (lane % 4)
            raw = self.shared[rows[:, None] + np.arange(4)]
            self.set(register, np.ascontiguousarray(raw).view(np.uint32)[:, 0], "b32", active)

    def pack(self, bits: int, out: str, source: str, active: np.ndarray) -> None:
        """``mov.b64 {a, b}, c`` and ``mov.b64 c, {a, b}``, the same for 32 bits."""
        half = bits // 2
        if out.startswith("{"):
            value = self.value(source, f"b{bits}")
            for k, register in enumerate(out.strip("{} ").replace(",", " ").split()):
                if register != "_":
                    self.set(register, value >> value.dtype.type(half * k), f"b{half}", active)
        else:
            low, high = (
                self.value(r, f"b{half}").astype(_INTEGER[bits]) for r in source.strip("{} ").replace(",", " ").split()
            )
            self.set(out, low | high << low.dtype.type(half), f"b{bits}", active)

    def convert(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        to, source = name[-2], name[-1]
        values = [self.value(x, source) for x in operands[1:]]
        if to.endswith("x2"):
            high, low = (raw_of(v, to[:-2]).astype(np.uint32) for v in values)
            return self.set(operands[0], low | high << np.uint32(16), "b32", active)
        value = values[0]
        if to[0] == "f" and bits_of(to) > 16:
            value = value.astype(f"f{bits_of(to) // 8}")
        elif to[0] in "us":
            value = np.trunc(value).astype(np.int64) if source[0] == "f" else value.astype(np.int64).view(np.uint64)
        return self.set(operands[0], value, to, active)

    def compare(self, how: str, kind: str, operands: list[str], active: np.ndarray) -> None:
        if kind.endswith("x2"):
            pair = [self.value(x, "u32") for x in operands[1:3]]
            for k, target in enumerate(operands[0].split("|")):
                halves = [typed(x >> np.uint32(16 * k), kind[:-2]) for x in pair]
                self.set(target, self.ordered(how, *halves), "pred", active)
        else:
            self.set(operands[0], self.ordered(how, *(self.value(x, kind) for x in operands[1:3])), "pred", active)

    @staticmethod
    def ordered(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nan = np.isnan(a) | np.isnan(b)
        if how in ("nan", "num"):
            return nan if how == "nan" else ~nan
        if how.endswith("u") and how[:-1] in _COMPARE:
            return _COMPARE[how[:-1]](a, b) | nan
        return _COMPARE[how](a, b) & ~nan
