"""Compile a Triton kernel for a GPU that is not there, and count what its machine code will do.

Triton's wheel has the assembler and the disassembler. Time is not told by this, but registers, spills and the
instructions of a loop are what a launch would have: many kernels are bound by one of them.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainc.kernels.library.launch import PINNED

WARP = 32
# Sizes that are taken to be multiples of 16 where nothing else is said, as pointers are: then loads can be wide.
DIVISIBLE = ("width", "channels", "classes", "count", "span")

_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction: its name with all suffixes, its operands, the predicate it waits for or ""."""

    name: str
    operands: str = ""
    predicate: str = ""


@dataclass(frozen=True)
class Code:
    """A kernel's machine instructions in order, and the place each label stands for."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]

    def count(self, *names: str) -> int:
        """How many instructions begin with one of the names."""
        return sum(one.name.startswith(names) for one in self.instructions)

    @cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """What one turn of each loop executes, at the least: branches inside are taken where that is shorter."""
        found = []
        for place, one in enumerate(self.instructions):
            target = self._target(one)
            if target is not None and place - target > 1:
                found.append(self._shortest(target, place))
        return [turn for turn in found if turn]

    @cached_property
    def once(self) -> tuple[Instruction, ...]:
        """The instructions outside of every loop."""
        inside: set[int] = set()
        for place, one in enumerate(self.instructions):
            target = self._target(one)
            if target is not None and target < place:
                inside.update(range(target, place + 1))
        return tuple(one for place, one in enumerate(self.instructions) if place not in inside)

    @property
    def main_loop(self) -> tuple[Instruction, ...]:
        """The loop whose turn is longest; empty without a loop."""
        return max(self.loops, key=len, default=())

    def _target(self, one: Instruction) -> int | None:
        found = _TARGET.search(one.operands) if one.name.startswith("BRA") else None
        return self.labels.get(found[1]) if found else None

    def _shortest(self, first: int, last: int) -> tuple[Instruction, ...]:
        """The fewest instructions from one place to a later one."""
        lengths: dict[int, int] = {first: 0}
        came: dict[int, int] = {}
        for place in range(first, last):
            if place not in lengths:
                continue
            one = self.instructions[place]
            target = self._target(one)
            following = [target] if target is not None and first < target <= last else []
            if not _always_leaves(one):
                following.append(place + 1)
            for after in following:
                if lengths[place] + 1 < lengths.get(after, len(self.instructions)):
                    lengths[after], came[after] = lengths[place] + 1, place
        if last not in lengths:
            return ()
        turn = [last]
        while turn[-1] != first:
            turn.append(came[turn[-1]])
        return tuple(self.instructions[place] for place in reversed(turn))


def _always_leaves(one: Instruction) -> bool:
    """Whether nothing goes on behind it: BRA.DIV and BRA.CONV ask of a warp's threads, others of a predicate."""
    asks = one.predicate or one.operands.lstrip().startswith(("P", "!P", "U", "!U"))
    return one.name in ("BRA", "BRA.U", "EXIT") and not asks


@dataclass(frozen=True, slots=True)
class Resources:
    """What a program takes: registers a thread, bytes a thread spills, bytes of shared memory, and its warps."""

    registers: int
    spilled: int
    shared: int
    warps: int


def compiled(
    function: Any,
    arguments: str,
    options: Mapping[str, Any],
    warps: int,
    architecture: int = 90,
    divisible: tuple[str, ...] = DIVISIBLE,
    **more: Any,
) -> Any:
    """Compile as a launch would: pointers and the sizes named in `divisible` are multiples of 16.

    `arguments` is "NAME:type ..", `options` are the constexprs (a dtype by its name), `more` the launch's own.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(part.split(":") for part in arguments.split())
    signature |= dict.fromkeys(options, "constexpr")
    names = [parameter.name for parameter in function.params]
    if set(names) != set(signature):
        raise ValueError(f"{sorted(set(names) ^ set(signature))} of {function} are not given once")
    wide = [name for name, kind in signature.items() if kind.startswith("*") or name in divisible]
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={
            (names.index(name),): getattr(tl, value)
            if isinstance(value, str) and hasattr(tl, value)
            else value
            for name, value in options.items()
        },
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in wide},
    )
    target = GPUTarget("cuda", architecture, WARP)
    return triton.compile(source, target=target, options={"num_warps": warps, **PINNED, **more})


def resources(kernel: Any, architecture: int = 90) -> Resources:
    """What the assembler says of a kernel that `compiled` returned."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        report = subprocess.run(
            [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", source,
             "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    used = re.search(r"Used (\d+) registers", report)
    if not spills or used is None:
        raise RuntimeError(f"the assembler's report is not understood: {report}")
    metadata = kernel.metadata
    return Resources(int(used[1]), sum(map(int, spills)), metadata.shared, metadata.num_warps)


def disassembled(kernel: Any) -> Code:
    """The machine code of a kernel that `compiled` returned."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        report = subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True)
    return parsed(report.stdout)


def parsed(text: str) -> Code:
    """Read a disassembly as `nvdisasm -c` prints it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, found = _LABEL.match(line.strip()), _LINE.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append(Instruction(found[2], found[3].strip(), found[1] or ""))
    return Code(tuple(instructions), labels)


def per_element(kernel: Any, elements: int, loop: bool = True) -> float:
    """Instructions a thread runs for each element: in a turn of the main loop, which handles `elements` a program.

    A kernel without a loop is counted whole, and without `loop` what stands outside of loops.
    """
    code = disassembled(kernel)
    counted = (code.main_loop or code.instructions) if loop else code.once
    threads: int = WARP * kernel.metadata.num_warps
    return len(counted) * threads / elements
