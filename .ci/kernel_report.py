"""Prints what each CUDA kernel of the built library takes; fails on what slows a main loop.

    python .ci/kernel_report.py [LIBRARY]

Registers, stack and static shared memory come from cuobjdump, instructions from the SASS. A local
access (LDL, STL) or a memory barrier between the first and the last tensor core instruction of a
kernel stands in its main loop and costs on every step: the exit status is then 1. So it is where a
main loop moves more words to uniform registers (R2UR) than it has wgmma: the descriptors are then
computed in vector registers, four words each, which takes twice the instructions.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nvidia.cu13

from torch_moe_ep._build_info import library_path

TOOLS = Path(next(iter(nvidia.cu13.__path__))) / "bin"
ARCHITECTURES = ("sm_80", "sm_90a")
FUNCTION = re.compile(r"\s*Function\s*:?\s*(\w+)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
TENSOR_CORE = ("HGMMA", "HMMA")
LOCAL = ("LDL", "STL")
BARRIER = ("MEMBAR",)
TO_UNIFORM = ("R2UR",)


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    instructions: list[str] = field(default_factory=list)

    def main_loop(self) -> list[str]:
        """What stands between the first and the last tensor core instruction."""
        places = [i for i, op in enumerate(self.instructions) if op.startswith(TENSOR_CORE)]
        return self.instructions[places[0] : places[-1] + 1] if places else []


def cuobjdump(*arguments: str) -> list[str]:
    """The lines that cuobjdump prints; it finds nvdisasm beside itself."""
    environment = {**os.environ, "NVDISASM_PATH": str(TOOLS)}
    done = subprocess.run(
        [str(TOOLS / "cuobjdump"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def kernels_of(library: Path, architecture: str) -> list[Kernel]:
    """All kernels that the library holds for one architecture."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for options in (["-res-usage"], ["-sass"]):
        for line in cuobjdump(*options, "-arch", architecture, str(library)):
            if match := FUNCTION.match(line):
                current = kernels.setdefault(match[1], Kernel(match[1]))
            elif current is None:
                continue
            elif match := RESOURCES.search(line):
                current.registers, current.stack_bytes, current.shared_bytes = map(
                    int, match.groups()
                )
            elif match := INSTRUCTION.match(line):
                current.instructions.append(match[1])
    # The sm_90a kernels have empty bodies for other architectures.
    return [k for k in kernels.values() if architecture == "sm_90a" or "4sm90" not in k.name]


def readable(names: list[str]) -> list[str]:
    """Kernel names as in the source, without namespaces and parameters."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = []
    for name in done.stdout.splitlines():
        text = re.sub(r"\(anonymous namespace\)::|torch_moe_ep::|^void |\((\w+)\)(?=\d)", "", name)
        short.append(re.sub(r"\(\w+(, \w+)*\)$", "", text))
    return short


def main() -> int:
    """Print the table; 1 when a main loop has what slows it."""
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else library_path()
    is_clean = True
    sizes = f"{'regs':>4} {'stack':>6} {'shared':>7}"
    print(f"{'arch':<7} {sizes} {'mma':>4} {'local':>6} {'r2ur':>5}  kernel")
    for architecture in ARCHITECTURES:
        kernels = kernels_of(library, architecture)
        for kernel, name in zip(kernels, readable([k.name for k in kernels]), strict=True):
            loop = kernel.main_loop()
            bad = sum(op.startswith((*LOCAL, *BARRIER)) for op in loop)
            moved = sum(op.startswith(TO_UNIFORM) for op in loop)
            num_mma = sum(op.startswith(TENSOR_CORE) for op in loop)
            is_clean &= bad == 0 and moved <= num_mma
            print(
                f"{architecture:<7} {kernel.registers:>4} {kernel.stack_bytes:>6} "
                f"{kernel.shared_bytes:>7} {num_mma or '':>4} {bad if loop else '':>6} "
                f"{moved if loop else '':>5}  {name}"
            )
    if not is_clean:
        print("a main loop has local memory, a memory barrier (column local) or more r2ur than mma")
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
