"""One update of the weights, which nothing but a look at its numbers waits for."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, Protocol, cast

import torch
import torch._dynamo.exc
from lightning_fabric import Fabric
from torch import Tensor, nn

from lomar.data.loader import MicroBatch
from lomar.errors import TrainingError
from lomar.training.sharding import Sharded, is_sharded, local_part


class Paced(Protocol):
    """A method of which more changes with the steps than the weights that the optimiser updates."""

    def begin(self, step: int) -> None:
        """Called before the forward passes of the update that follows `step` updates."""

    def before_update(self) -> None:
        """Called when all gradients of a step are there, before they are clipped."""

    def after_update(self) -> dict[str, Tensor]:
        """Called when the weights are updated; named numbers of the step, which stay on the device."""

    def trouble(self, numbers: Mapping[str, float]) -> str:
        """What is wrong with the numbers of a step; "" if nothing."""


class Step:
    """Forward and backward passes of a step's micro-batches, then the update.

    Losses and norms stay on the device: nothing here waits for it.

    Args:
        fabric: devices, precision and processes.
        method: a batch's inputs by name -> sum of losses and how many they are (hidden patches, images).
        optimizer: over the method's parameters; a group's `lr_scale` is a factor of its rate.
        batch_size: images of a step, over all processes.
        clip_grad: largest gradient norm; 0 for none.
        compiled: whether the method's forward and backward passes are compiled, as one graph a shape of micro-batch.
        clip_each: whether it is the norm of each tensor's gradient, and not of all together.
        paced: the method, if it has more to do in a step.
    """

    def __init__(
        self,
        fabric: Fabric,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        clip_grad: float,
        compiled: bool = False,
        clip_each: bool = False,
        paced: Paced | None = None,
    ) -> None:
        self.fabric = fabric
        self.method = method
        self.paced = paced
        self.numbers: dict[str, Tensor] = {}  # of the last step
        if compiled:
            # Within DDP, whose own code is no graph; it splits the graph to send gradients as they come, which it
            # cannot where blocks are worked out again. Shapes are fixed but for a step's last micro-batch.
            if fabric.world_size > 1:
                torch._dynamo.config.optimize_ddp = not any(
                    getattr(m, "grad_checkpointing", False) for m in method.modules()
                )
            method.compile(fullgraph=True, dynamic=False)
        # What is trained is the method itself, or a spread copy of it.
        self.sharded = Sharded(fabric, method, optimizer) if is_sharded(fabric) else None
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        if self.sharded:
            self.model, self.optimizer = self.sharded.model, self.sharded.optimizer
        else:
            self.model, self.optimizer = fabric.setup(method, optimizer)
        self.batch_size = batch_size
        self.clip_grad = clip_grad
        self.clip_each = clip_each
        self._loss_sum, self._counted = self._zero(), self._zero()

    def begin(self, step: int) -> None:
        """Before the first micro-batch of the update that follows `step` updates."""
        if self.paced:
            self.paced.begin(step)

    def learn(self, inputs: Mapping[str, Tensor], last: bool = True) -> None:
        """Add the gradients of a micro-batch.

        Args:
            inputs: what the method takes, by name, on the device.
            last: whether it ends this process's share of the step.

        Raises:
            TrainingError: the step cannot be compiled here.
        """
        with self.fabric.no_backward_sync(self.model, enabled=not last), _told_if_not_compiled():  # type: ignore[arg-type]
            losses, count = self.model(**inputs)
            # DDP averages over processes; with the world size the gradients add up to that of the sum.
            self.fabric.backward(losses * (self.fabric.world_size / self.batch_size))
        self._loss_sum += losses.detach()
        self._counted += count

    def update(self, lr: float, weight_decay: float | None = None) -> tuple[Tensor, Tensor]:
        """Update the weights by what was learnt since the last time.

        Args:
            lr: learning rate.
            weight_decay: of the groups that are decayed; None leaves it as it is.

        Returns:
            The mean loss and the norm of its gradient before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if weight_decay is not None and group["decayed"]:
                group["weight_decay"] = weight_decay
        summed = self.fabric.all_reduce(torch.stack([self._loss_sum, self._counted]), reduce_op="sum")
        loss_sum, counted = cast(Tensor, summed)
        if self.paced:
            self.paced.before_update()
        grad_norm = self._scale_gradients(self.batch_size / counted)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.paced:
            self.numbers = self.paced.after_update()
        self._loss_sum, self._counted = self._zero(), self._zero()
        return loss_sum / counted, grad_norm

    def _scale_gradients(self, scale: Tensor) -> Tensor:
        """Turn gradients of (sum / batch) into those of the mean; clip them; return their norm."""
        gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) * scale
        if self.clip_each and self.clip_grad:
            factors = [
                scale * (self.clip_grad / (each * scale)).clamp(max=1.0) for each in torch._foreach_norm(gradients)
            ]
            torch._foreach_mul_(gradients, [f.to(g.dtype) for f, g in zip(factors, gradients, strict=True)])
            return norm
        if self.sharded:
            norm = cast(Tensor, self.fabric.all_reduce(norm.square(), reduce_op="sum")).sqrt()
        factor = scale * (self.clip_grad / norm).clamp(max=1.0) if self.clip_grad else scale
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        return norm

    def whole_state(self) -> dict[str, Any]:
        """Weights and the optimiser's state, of all processes; all of them must call it."""
        if self.sharded:
            self.sharded.bring_up_to_date()
            return {"model": self.method.state_dict(), "optimizer": self.sharded.optimizer_state()}
        return {"model": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Back to a state as `whole_state` gives it, of any number of processes.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another method.
        """
        self.method.load_state_dict(state["model"])
        if self.sharded:
            self.sharded.take_over()
            self.sharded.load_optimizer_state(state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])

    def bring_up_to_date(self) -> None:
        """What was learnt, into the method, for those who look at it; all processes must call it."""
        if self.sharded:
            self.sharded.bring_up_to_date()

    def train(self) -> None:
        """Method and model in training mode."""
        self.method.train()
        self.model.train()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.fabric.device)


@contextmanager
def _told_if_not_compiled() -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"the step cannot be compiled here ({reason}); --compile no does without") from error


def on_device(batches: Generator[MicroBatch, None, None], device: torch.device) -> Generator[MicroBatch, None, None]:
    """The same micro-batches on a device; a GPU gets the next one while it works on this one.

    Args:
        batches: in page-locked memory, if the copy is to overlap with work. Closed with this.
        device: where to.
    """
    with closing(batches):
        if device.type != "cuda":
            for batch in batches:
                yield batch.to(device)
            return
        copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        for batch in batches:  # asked for while the GPU still works on the one before
            with torch.cuda.stream(copying):
                copied = batch.to(device)
            computing.wait_stream(copying)
            for tensor in copied.inputs.values():
                tensor.record_stream(computing)  # its memory is not given away before that has used it
            yield copied
