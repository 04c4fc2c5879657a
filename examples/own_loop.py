"""SMART in a training loop of one's own: ``python examples/own_loop.py``. Three lines are new."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import microglia as mg


def main(epochs: int = 4) -> None:
    """Trains with masks that are learned, and folds them into the weights."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    loader = DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    pruner = mg.methods.Smart(model, pattern="block:8x1", density=0.4, exclude=["4"], total_steps=epochs * len(loader))  # new
    optimizers = [torch.optim.Adam(pruner.weights_to_train(), lr=0.01), *pruner.optimizers()]
    for epoch in range(epochs):
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets) + pruner.penalty()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            pruner.step(optimizers[0])  # new
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    pruner.finish()  # new
    print(mg.masks_of(model))
    mg.fold(model)


if __name__ == "__main__":
    main()
