"""Read what a compiled CUDA kernel executes: instructions, registers, local and shared memory, width of accesses.

Works on any cubin, whoever compiled it; needs ``nvdisasm`` and ``cuobjdump`` (Triton ships them, so does CUDA).

How instructions are counted: one for each SASS instruction, predicated ones too, since they take an issue slot either
way. :meth:`Kernel.path` counts the longest way from the entry to an exit that takes no branch backwards, so each
loop body counts once; NOPs and the branch to itself behind the last exit are never on it. :meth:`Kernel.loops` counts
the bodies. Divided by the elements a thread handles, this is the number of instructions an element that budgets use.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
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

    def path(self, avoid: Callable[[Instruction], bool] = lambda _: False) -> int | None:
        """Instructions on the longest forward path that runs none for which ``avoid`` is true; None: there is none."""
        longest: list[int | None] = [None] * (len(self.instructions) + 1)
        for i in range(len(self.instructions) - 1, -1, -1):
            instruction = self.instructions[i]
            conditional = bool(instruction.predicate) or re.match(r"!?U?P\d", instruction.operands)
            ways = []
            if instruction.op in ("EXIT", "RET"):
                ways.append(0)
            if instruction.target is not None and instruction.target > i:
                ways.append(longest[instruction.target])
            if instruction.op not in ("EXIT", "RET", "BRA") or conditional:
                ways.append(longest[i + 1])
            ways = [way for way in ways if way is not None]
            if ways and not avoid(instruction):
                longest[i] = 1 + max(ways)
        return longest[0]

    def rounds(self) -> list[tuple[int, tuple[Instruction, ...]]]:
        """Of every loop the instructions on the shortest way around, and all that it holds; the longest loop first.

        The shortest way is the one past what happens only at ends, where a loop has a case for them.
        """
        found = []
        for end, branch in enumerate(self.instructions):
            start = branch.target
            if start is None or start >= end:
                continue
            ways: list[int | None] = [None] * (end - start + 1)
            ways[-1] = 1
            for i in range(end - 1, start - 1, -1):
                one = self.instructions[i]
                conditional = bool(one.predicate) or re.match(r"!?U?P\d", one.operands)
                after = []
                if one.target is not None and i < one.target <= end:
                    after.append(ways[one.target - start])
                if one.op not in ("EXIT", "RET", "BRA") or conditional:
                    after.append(ways[i + 1 - start])
                after = [way for way in after if way is not None]
                ways[i - start] = 1 + min(after) if after else None
            if ways[0] is not None:
                found.append((ways[0], self.instructions[start : end + 1]))
        return sorted(found, key=lambda loop: -len(loop[1]))

    def loops(self) -> list[int]:
        """Static instructions of every loop, from the target of a backward branch to the branch itself."""
        ends = [(one.target, i) for i, one in enumerate(self.instructions) if one.target is not None]
        return sorted((end - start + 1 for start, end in ends if start < end), reverse=True)


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
