"""What an exported file lists in its metadata: its operators, whatever became of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dat_deploy.plugins.operator import specification
from dat_deploy.plugins.specification import Role

__all__ = ["PROPERTY", "OperatorRecord", "operator_records"]

PROPERTY = "dat_deploy.operators"  # of a file, in JSON


@dataclass(frozen=True)
class OperatorRecord:
    """Where an operator stands in a file, whatever its lowering; every file lists its operators in its metadata.

    Attributes:
        name: `stages.2.attns.1/deformable_attention`.
        attributes: their values by name.
        inputs: parameter of the operator -> name of the tensor, without those that are weights; output: likewise.
    """

    name: str
    operator: str
    attributes: dict[str, Any]
    inputs: dict[str, str]
    output: str

    @property
    def locations(self) -> list[str]:
        """The tensors that say where it reads."""
        return [self.inputs[name] for name in specification(self.operator).named(Role.LOCATIONS) if name in self.inputs]


def operator_records(properties: Mapping[str, str]) -> list[OperatorRecord]:
    """The operators that a file's metadata lists; none if it has no such list."""
    return [OperatorRecord(**fields) for fields in json.loads(properties.get(PROPERTY, "[]"))]
