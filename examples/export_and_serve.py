"""Export a pruned network to ONNX and answer one request from the file: ``python examples/export_and_serve.py``.

``examples/serve/app.py`` serves the same file over HTTP. This needs the extra ``export``.
"""

import torch
from torch import nn

import microglia as mg


def main() -> None:
    """Prunes, writes a file that was compared with the model, and runs it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(2304, 4)).eval()
    images = torch.randn(2, 3, 16, 16)
    small = mg.prune_channels(model, images, mg.Budget(density=0.5), round_to=1)
    written = mg.export(small, "model.onnx", images)
    print(written)

    import onnxruntime

    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), small(images), rtol=1e-4, atol=1e-4)
    print(answer.argmax(1))


if __name__ == "__main__":
    main()
