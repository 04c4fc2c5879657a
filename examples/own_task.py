"""A task of one's own, a regression, pruned by a library training: ``python examples/own_task.py``."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import microglia as mg


def samples(seed: int) -> TensorDataset:
    """Returns points and the function to learn."""
    x = torch.rand(256, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x * 6).sin().sum(1, keepdim=True))


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the absolute error of each example."""
    return (outputs - targets).abs().flatten(1).mean(1)


def waves() -> mg.Task:
    """Returns the task; in a recipe it is ``task: own_task:waves``."""
    return mg.Task(
        "waves",
        build=lambda: nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        data=mg.tasks.loaders(train=mg.tasks.samples(samples(0)), test=mg.tasks.samples(samples(1))),
        loss=nn.functional.mse_loss,
        metrics={"error": mg.tasks.mean_metric(error, better="lower", unit="")},
        example=torch.zeros(1, 2),
    )


def main(epochs: int = 4) -> None:
    """Trains, prunes, trains on and evaluates."""
    torch.manual_seed(0)
    task = waves()
    model = task.build()
    mg.fit(model, task, mg.FitConfig(epochs=epochs, lr=0.05, batch_size=32))
    print("dense", mg.evaluate(model, task))
    mg.methods.OneShot(model, density=0.3, exclude=["4"]).finish()
    print("pruned", mg.evaluate(model, task))
    mg.fit(model, task, mg.FitConfig(epochs=epochs, lr=0.02, batch_size=32))  # masked weights stay 0
    print("recovered", mg.evaluate(model, task), mg.masks_of(model))


if __name__ == "__main__":
    main()
