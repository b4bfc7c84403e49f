"""Read what a compiled CUDA kernel executes: instructions, registers, local and shared memory, width of accesses.

Works on any cubin, whoever compiled it; needs ``nvdisasm`` and ``cuobjdump`` (Triton ships them, so does CUDA).

How instructions are counted: one for each SASS instruction, predicated ones too, since they take an issue slot either
way. :meth:`Kernel.path` counts the longest way from the entry to an exit that takes no branch backwards, so each
loop body counts once; NOPs and the branch to itself behind the last exit are never on it. :meth:`Kernel.loops` finds
the bodies. Divided by the elements a thread handles, this is the number of instructions an element that budgets use;
sass_pipes.py says where each of them runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L\w+):")
_FUNCTION = re.compile(r"\s*\.text\.(\S+):")
_USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """``@predicate mnemonic operands``; ``target`` is the index a branch goes to, else None."""

    predicate: str
    mnemonic: str
    operands: str
    target: int | None = None

    @property
    def op(self) -> str:
        """The mnemonic without its modifiers."""
        return self.mnemonic.split(".")[0]

    @property
    def bits(self) -> int:
        """Width of a memory access in bits."""
        found = re.search(r"\.(?:[US]?(8|16)|(64|128))\b", self.mnemonic)
        return int(found.group(1) or found.group(2)) if found else 32


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin. ``stack`` is in bytes a thread; ``shared`` is the static shared memory in bytes."""

    name: str
    instructions: tuple[Instruction, ...]
    registers: int
    stack: int
    shared: int

    def counts(self) -> Counter[str]:
        """Instructions by op, the whole kernel."""
        return Counter(i.op for i in self.instructions)

    def widths(self, op: str) -> Counter[int]:
        """Accesses of ``op`` ("LDG", "STG", ...) by width in bits."""
        return Counter(i.bits for i in self.instructions if i.op == op)

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory: spills, or arrays that did not fit into registers."""
        return sum(self.counts()[op] for op in ("LDL", "STL"))

    @property
    def shared_accesses(self) -> int:
        """Loads and stores of shared memory, matrix ones and atomics too, and barriers."""
        return sum(self.counts()[op] for op in ("LDS", "STS", "LDSM", "STSM", "ATOMS", "BAR"))

    def way(self, avoid: Callable[[Instruction], bool] = lambda _: False) -> tuple[int, ...] | None:
        """Places of the instructions on the longest forward way from the entry to an exit that runs none for which
        ``avoid`` is true; None: there is none."""
        return self._way(0, len(self.instructions), max, avoid)

    def path(self, avoid: Callable[[Instruction], bool] = lambda _: False) -> int | None:
        """The number of instructions on :meth:`way`."""
        way = self.way(avoid)
        return None if way is None else len(way)

    def loops(self) -> list[range]:
        """Where every loop lies, from the target of a backward branch to the branch itself; the longest first."""
        ends = [(one.target, i) for i, one in enumerate(self.instructions) if one.target is not None]
        return sorted((range(start, end + 1) for start, end in ends if start < end), key=lambda loop: -len(loop))

    def around(self, loop: range) -> tuple[int, ...] | None:
        """Places of the instructions on the shortest way once around ``loop``: the one past what happens only at ends,
        where a loop has a case for them, and past inner loops. None: it always leaves."""
        return self._way(loop.start, loop.stop - 1, min, lambda _: False)

    def at(self, places: Iterable[int]) -> list[Instruction]:
        """The instructions at ``places``, in that order."""
        return [self.instructions[i] for i in places]

    def _way(
        self, start: int, end: int, choose: Callable, avoid: Callable[[Instruction], bool]
    ) -> tuple[int, ...] | None:
        """From ``start`` on without branches backwards to ``end``, the branch that closes a loop, or to an exit."""
        size = len(self.instructions)
        ways: list[tuple[int, int | None] | None] = [None] * (size + 1)  # instructions from here on, and the next place
        for i in range(min(end, size - 1), start - 1, -1):
            one = self.instructions[i]
            conditional = bool(one.predicate) or re.match(r"!?U?P\d", one.operands)
            after: list[tuple[int, int | None]] = []
            if i == end or (end == size and one.op in ("EXIT", "RET")):
                after.append((0, None))
            places = [one.target] if one.target is not None and one.target > i else []
            if one.op not in ("EXIT", "RET", "BRA") or conditional:
                places.append(i + 1)
            if i != end:
                after += [(ways[j][0], j) for j in places if ways[j] is not None]
            if after and not avoid(one):
                length, following = choose(after, key=lambda way: way[0])
                ways[i] = (1 + length, following)
        if ways[start] is None:
            return None
        found, place = [], start
        while place is not None:
            found.append(place)
            place = ways[place][1]
        return tuple(found)


def read(cubin: str | Path) -> dict[str, Kernel]:
    """The kernels of the file ``cubin`` by (mangled) name.

    Raises:
        FileNotFoundError: there is no nvdisasm or cuobjdump.
        subprocess.CalledProcessError: the file is not a cubin that they can read.
    """
    usage = {
        name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(_run("cuobjdump", "-res-usage", cubin))
    }
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in _run("nvdisasm", "-c", cubin).splitlines():
        if found := _FUNCTION.match(line):
            lines = functions.setdefault(found.group(1), [])
        else:
            lines.append(line)
    return {
        name: Kernel(name, _instructions(lines), *usage[name][:3]) for name, lines in functions.items() if name in usage
    }


def tool(name: str) -> str | None:
    """Where ``nvdisasm`` or another CUDA binary utility is: on PATH, in CUDA_HOME or in Triton's package."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    try:
        import triton

        places.insert(0, str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return next(filter(None, (shutil.which(name, path=place) for place in (*places, None))), None)


def _run(name: str, *arguments: str | Path) -> str:
    program = tool(name)
    if program is None:
        raise FileNotFoundError(f"{name} not found: install triton, or put the CUDA toolkit on PATH or in CUDA_HOME")
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def _instructions(lines: list[str]) -> tuple[Instruction, ...]:
    labels: dict[str, int] = {}
    found = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif instruction := _INSTRUCTION.search(line):
            found.append(instruction.groups(default=""))
    result = []
    for predicate, mnemonic, operands in found:
        target = re.search(r"\.L\w+", operands) if mnemonic.split(".")[0] == "BRA" else None
        result.append(Instruction(predicate, mnemonic, operands, target and labels[target.group(0)]))
    return tuple(result)
