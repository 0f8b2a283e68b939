"""The operators by name, and what is in the folder of each: a new one is a folder, and its name here."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dat_deploy.plugins.specification import Specification

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OPERATORS", "Operator", "specification"]

OPERATORS = ("deformable_sample", "deformable_attention", "window_attention", "neighborhood_attention")

Tensors = Mapping[str, "Tensor"]


def specification(name: str) -> Specification:
    """The specification of one of OPERATORS."""
    return Operator(name).specification


@dataclass(frozen=True)
class Operator:
    """One of OPERATORS; each part of it is imported when it is asked for."""

    name: str

    @property
    def specification(self) -> Specification:
        found: Specification = importlib.import_module(f"dat_deploy.plugins.{self.name}.specification").SPECIFICATION
        return found

    @property
    def reference(self) -> Callable[..., "Tensor"]:
        """What it means, in torch."""
        found: Callable[..., Tensor] = getattr(
            importlib.import_module(f"dat_deploy.plugins.{self.name}.reference"), self.name
        )
        return found

    @property
    def torch_operator(self) -> Callable[..., "Tensor"]:
        """The public function; importing it makes `torch.ops.dat_deploy.NAME`."""
        found: Callable[..., Tensor] = getattr(
            importlib.import_module(f"dat_deploy.plugins.{self.name}.torch_op"), self.name
        )
        return found

    @property
    def onnx_function(self) -> ModuleType:
        """Has BODIES, one a lowering, and HELPERS, the functions that those call."""
        return importlib.import_module(f"dat_deploy.plugins.{self.name}.onnx_function")

    @property
    def kernel(self) -> ModuleType:
        """Has `problem`, `configurations` and `launch`; importing it imports Triton."""
        return importlib.import_module(f"dat_deploy.plugins.{self.name}.kernel")

    def mistakes(self, inputs: Tensors, attributes: Mapping[str, Any]) -> Iterator[tuple[str, "Tensor"]]:
        """What it would give if it were wrong in one of the ways that exports and runtimes often are.

        Args:
            inputs: all of them, in float64.

        Yields:
            `the bias table were zero` and the output, one after another as they are asked for.
        """
        found = _mistakes(self.name)
        return iter(()) if found is None else found.mistakes(inputs, attributes)

    @property
    def parts(self) -> dict[str, Callable[[Tensors], dict[str, "Tensor"]]]:
        """What of it may be wrong alone: the name of the part -> inputs like these in which it tells nothing."""
        return getattr(_mistakes(self.name), "PARTS", {})


@functools.cache
def _mistakes(name: str) -> ModuleType | None:
    module = f"dat_deploy.plugins.{name}.mistakes"
    return None if importlib.util.find_spec(module) is None else importlib.import_module(module)
