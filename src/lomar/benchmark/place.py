"""Where a cell is measured: device, precision and processes, as a run of lomar has them."""

import os
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric

from lomar.benchmark.cells import Cell
from lomar.training.precision import precision_on


@dataclass(frozen=True)
class Place:
    """Devices, precision and processes of a cell.

    Args:
        fabric: what a run of lomar is set up by.
        compiled: whether torch.compile makes one graph of the work.
        precision: "fp32" or "bf16".
    """

    fabric: Fabric
    compiled: bool
    precision: str

    @classmethod
    def found(cls, cell: Cell) -> "Place":
        """That of a cell; with several processes, torchrun has started this one."""
        fabric = Fabric(
            accelerator=cell.device,
            devices=cell.processes,
            strategy="ddp" if cell.processes > 1 else "auto",
            plugins=precision_on(cell.device, cell.precision),
        )
        fabric.launch()
        return cls(fabric, cell.compiled, cell.precision)

    @staticmethod
    def is_first() -> bool:
        """Whether this process speaks for all."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.fabric.device

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def wait(self) -> None:
        """Until the device has done all, in every process."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.fabric.barrier()

    def leave(self) -> None:
        """End the processes' connection, once all are done."""
        self.fabric.barrier()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
