"""Layer-wise pruning killed by kill -9 after any block: started again it ends in the same bits."""

import os
import signal

import torch
from torch import nn

from commands import CONTEXT
from microglia.methods import Layerwise
from microglia.storage.run import Run

BLOCKS = 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(BLOCKS)))


def batches():
    return [torch.randn(30, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def pruner(model):
    return Layerwise(model, batches(), rule="sparsegpt", density=0.4)


def dies_after(block, folder):
    """Prunes, and is killed as soon as a block is finished."""
    finish = Layerwise._stage

    def stage(self, run, index, module):
        rows = finish(self, run, index, module)
        if index == block:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows

    Layerwise._stage = stage
    torch.set_num_threads(1)
    pruner(net()).prune(Run(folder, {}))


def test_killed_after_any_block_it_resumes_to_the_same_bits(tmp_path):
    """One process dies after the first block, the next goes on and dies after the second, and so on; the last one is here."""
    whole = net()
    expected = pruner(whole).prune()
    for block in range(BLOCKS):
        process = CONTEXT.Process(target=dies_after, args=(block, tmp_path / "run"))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        stages = {path.name for path in (tmp_path / "run" / "stages").glob("block-*.safetensors")}
        assert stages == {f"block-{i:03d}.safetensors" for i in range(block + 1)}
    model = net()
    assert pruner(model).prune(Run(tmp_path / "run", {})) == expected
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
