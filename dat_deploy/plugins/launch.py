"""How a kernel is launched: one description that the torch operator, the TensorRT plugin and the tests all use.

The arguments of every kernel stand in one order, that of TensorRT's ahead-of-time plugins: pointers to the inputs,
int32 scalars, the pointer to the output. All that is left is compiled in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Configuration", "Launch", "Problem", "Shape", "are_known", "ceil_div", "next_power_of_two"]

Shape = Sequence[int]
Problem = Mapping[str, int]  # while torch.compile traces, what is not compiled in may be a symbol


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def are_known(problem: Problem, *names: str) -> bool:
    """Whether these are numbers, not symbols: what is compiled in then depends on them, and on nothing else."""
    return all(isinstance(problem[name], int) for name in names)


@dataclass(frozen=True)
class Configuration:
    """How a kernel cuts up its work: this changes its speed, and of its answer the rounding alone.

    Attributes:
        tiles: sizes of the tiles by the kernel's names for them, such as ("BLOCK_KEYS", 64).
        num_warps: warps of 32 threads in a program.
        num_stages: how many steps of its loop have their loads under way.
        max_registers: that a thread may take, so that more programs fit on a multiprocessor; None for what the
            assembler likes. `torch.compile` and AOTInductor know no such limit and compile without it.
    """

    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the Triton function.
        programs: the grid is (programs, 1, 1).
        inputs: names of the tensors that the kernel reads, in order.
        scalars: the int32 arguments after them, in order.
        constants: what is compiled in. Some follow from the problem's sizes, all but the batch: a kernel compiled for
            one image size must not be launched for another.
    """

    kernel: Any
    programs: int
    inputs: tuple[str, ...]
    scalars: Mapping[str, int]
    constants: Mapping[str, int | float]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.programs, 1, 1)

    @property
    def block(self) -> tuple[int, int, int]:
        return (32 * self.num_warps, 1, 1)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit
