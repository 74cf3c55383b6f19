"""A toy method that does everything right, and one defective twin for every check."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_hpo import distributed
from lightning_hpo.callbacks.base import MethodCallback


class GradientScale(MethodCallback):
    """Follows the size of the gradient plus the loss, by SGD with momentum on one scalar."""

    _STATE = ("scale", "optimizer")

    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.scale], lr=0.1, momentum=0.9)
        self.window_loss: Tensor = torch.zeros(())

    def hyperparameters(self) -> dict[str, float | list[float]]:
        return {"scale": self.scale.item()}

    def reduce(self, loss: Tensor) -> Tensor:
        return distributed.mean(loss)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.window_loss = self.window_loss + loss.detach()  # divided by the accumulation factor already

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.learn(pl_module)

    def learn(self, pl_module: LightningModule) -> None:
        norm = torch.stack([p.grad.norm() for p in pl_module.parameters() if p.grad is not None]).norm()
        self.scale.grad = self.scale.detach() - (norm + self.reduce(self.window_loss))
        self.optimizer.step()
        self.window_loss = torch.zeros(())
        self.log_values(pl_module, {"scale": self.scale.detach()})


class ForgetsMomentum(GradientScale):
    _STATE = ("scale",)


class DrawsUnsavedNumbers(GradientScale):
    def reduce(self, loss: Tensor) -> Tensor:
        return distributed.mean(loss) + torch.rand(())


class ForgetsToReduce(GradientScale):
    def reduce(self, loss: Tensor) -> Tensor:
        return loss


class SumsOverRanks(GradientScale):
    def reduce(self, loss: Tensor) -> Tensor:
        return distributed.sum(loss)


class RegistersAParameter(GradientScale):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.network.rate = nn.Parameter(torch.zeros(()))


class AddsAnEntry(GradientScale):
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


class RefusesForeignCheckpoints(GradientScale):
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        assert self.state_key in checkpoint["callbacks"], "written without me"


class SavesAClass(GradientScale):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "module": nn.Linear(1, 1)}


class SavesNothing(GradientScale):
    _STATE = ()


class LeavesAHook(GradientScale):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.network.register_forward_hook(lambda *arguments: None)


class LeavesItFrozen(GradientScale):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.network.norm.requires_grad_(False)


class LeavesAForward(GradientScale):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        block = pl_module.network.blocks[0]
        forward = block.forward
        block.forward = lambda x: forward(x)


class LeavesAForwardWhenInterrupted(LeavesAForward):
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module.network.blocks[0].forward


class FitsOnce(GradientScale):
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)


class StepsEveryMicroBatch(GradientScale):
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.learn(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        pass


class SeesTheLastMicroBatchOnly(GradientScale):
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.window_loss = loss.detach() * trainer.accumulate_grad_batches


class KeepsHalfPrecision(GradientScale):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scale.data = self.scale.data.bfloat16()
        self.optimizer = torch.optim.SGD([self.scale], lr=0.1)

    def reduce(self, loss: Tensor) -> Tensor:
        return super().reduce(loss).bfloat16()

    def learn(self, pl_module: LightningModule) -> None:
        self.scale.grad = self.scale.detach() - self.reduce(self.window_loss)
        self.optimizer.step()


class LearnsNothing(GradientScale):
    def learn(self, pl_module: LightningModule) -> None:
        self.log_values(pl_module, {"scale": self.scale.detach()})


class Diverges(GradientScale):
    def reduce(self, loss: Tensor) -> Tensor:
        return loss * float("nan")


class LogsNothing(GradientScale):
    def log_values(self, *arguments: Any, **kwargs: Any) -> None:
        pass


class ReportsNothing(GradientScale):
    def hyperparameters(self) -> dict[str, float | list[float]]:
        return {}
