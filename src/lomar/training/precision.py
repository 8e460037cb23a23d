"""In what precision a run computes."""

from typing import Any

from lightning_fabric.plugins.precision import MixedPrecision, Precision


class Autocast(MixedPrecision):
    """Matrix products in bfloat16, and a method's input as it is: Fabric would round that too.

    Pixels that are floats, boxes, soft labels and the numbers that decide for a sample are more than bfloat16's 8 bits
    can tell apart.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_input(self, data: Any) -> Any:
        """Data of any kind, unchanged."""
        return data


def precision_on(device: str, precision: str) -> Precision:
    """What Fabric is to compute in.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
    """
    return Autocast(device) if precision == "bf16" else Precision()
