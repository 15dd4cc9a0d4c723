"""What differs between the versions of JAX that this library runs on, 0.10 to 0.12, and nothing else."""

from collections.abc import Sequence
from typing import Any


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """``(jaxpr, its constants)``: JAX 0.12 made one class of what was a ClosedJaxpr and the Jaxpr in it."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def scan_operands(params: dict[str, Any], operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """``(constants, carry, sliced)`` of a scan equation: counted by numbers up to JAX 0.10, by trees from 0.11 on."""
    if "ft_in" in params:
        consts, carry, _ = (len(list(part)) for part in params["ft_in"].unpack())
    else:
        consts, carry = params["num_consts"], params["num_carry"]
    return list(operands[:consts]), list(operands[consts : consts + carry]), list(operands[consts + carry :])
