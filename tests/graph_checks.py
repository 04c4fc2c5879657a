"""What the tests of the graph share: random values in float64, choices of kept units, the masked model."""

from __future__ import annotations

import math
from copy import deepcopy

import torch

EXACT = 1e-10


def stir(model, seed=0):
    """Float64, evaluation, and random values everywhere: no norm is an identity, no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel())) if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
            if parameter.ndim == 1:
                parameter.add_(0.7)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
            elif buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def halves(analysis, atoms, seed):
    """Half of each atom, at random places."""
    return {a: random_units(analysis.algebra.sizes[a], analysis.algebra.sizes[a] // 2, seed + a) for a in atoms}


def uneven(analysis, atoms, seed):
    """A random number of each atom, at least one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = analysis.algebra.sizes
    return {
        a: random_units(sizes[a], int(torch.randint(1, max(2, sizes[a]), (1,), generator=generator)), seed + a) for a in atoms
    }


def own_choices(analysis, atoms, seed):
    """Half of each atom, and where rows may choose for themselves of each row another half."""
    sizes, rows = analysis.algebra.sizes, analysis.rows
    drawn = {a: [random_units(sizes[a], sizes[a] // 2, seed + a + 99 * r) for r in range(rows.get(a, 1))] for a in atoms}
    return {a: torch.stack(units) if a in rows else units[0] for a, units in drawn.items()}


def random_units(size, count, seed):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, order[: max(1, count)], True)


def masked(model, cut, whole=()):
    """The model with zeros where the cut removes, but in the tensors left whole."""
    model = deepcopy(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in cut.analysis.parameter_dims and name not in whole:
                tensor.copy_(cut.zero(name, tensor))
        for name, tensor in model.named_buffers():
            if name in cut.analysis.parameter_dims and name not in whole:
                tensor.copy_(cut.zero(name, tensor))
    return model


def agree(got, wanted, tolerance=EXACT):
    got, wanted = got.detach(), wanted.detach()
    assert got.shape == wanted.shape
    assert torch.allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))
