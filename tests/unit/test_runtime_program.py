"""Programs of steps in 8 bits: the bits of one step after the other, which nodes of a graph they join, what they refuse."""

import copy
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import fresh
import microglia as mg
from microglia.core.batch import Example
from microglia.core.running import folded_twin, undisturbed
from microglia.runtime import level
from microglia.runtime.accelerate import sites_of
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.dense.packing import Packed
from microglia.runtime.int8 import lowering
from microglia.runtime.int8.calibration import ranges_of
from microglia.runtime.int8.candidates import int8_candidates
from microglia.runtime.int8.layers import Dequantize, Int8Layer, Pool8, Quantize, Scale
from microglia.runtime.int8.program import OF, Program, Step
from microglia.runtime.precisions import precision_of
from microglia.runtime.segments import Part

X = torch.randn(2, 3, 18, 14, generator=torch.Generator().manual_seed(1))


class Bottlenecks(nn.Module):
    """A stem with pooling, bottlenecks with a residual, a stride and dilation, two outputs, tokens and linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 24, 7, 2, 3), nn.Conv2d(24, 40, 1, 2)
        self.first = nn.ModuleList((nn.Conv2d(24, 16, 1), nn.Conv2d(16, 17, 3, 2, 1), nn.Conv2d(17, 40, 1)))
        self.second = nn.ModuleList((nn.Conv2d(40, 16, 1), nn.Conv2d(16, 16, 3, 1, 2, 2), nn.Conv2d(16, 40, 1)))
        self.side, self.inner = nn.Conv2d(40, 5, 1), nn.Linear(40, 48)
        self.outer, self.head = nn.Linear(48, 40), nn.Linear(40, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        a, b, c = self.first
        x = torch.relu(c(nn.functional.relu6(b(torch.relu(a(x))))) + self.down(x))
        a, b, c = self.second
        y = c(torch.relu(b(torch.relu(a(x))))) + x
        tokens = y.flatten(2).transpose(1, 2)
        tokens = torch.relu(self.outer(torch.relu(self.inner(tokens))) + tokens)
        return self.side(x), self.head(tokens), y


def lowered(model, x):
    """Returns a model with all layers in 8 bits."""
    example, twin = Example.of(x), folded_twin(model)
    with undisturbed():
        ways = [way for site in sites_of(twin, example, precision_of("int8")) for way in int8_candidates(site)]
        return lowering.lower_to_int8(twin, example, ways, ranges_of(twin, [example], Packed))


@pytest.fixture(scope="module")
def both():
    """The model in programs, and one step after the other."""
    torch.manual_seed(0)
    model = Bottlenecks()
    mg.methods.OneShot(model, pattern=mg.Block(16, 4), density=0.4, scope="layer").finish()
    model.eval()
    with pytest.MonkeyPatch.context() as patch:
        joined = lowered(model, X)
        patch.setattr(lowering, "programmed", lambda graph: graph)
        return joined, lowered(model, X)


def chain():
    """A program with each kind of step, whose input, pooled image and end go out, and two tensors that it takes."""
    generator, unit = torch.Generator().manual_seed(3), Scale(0.05, 100)

    def layer(outputs, inputs, *kernel, kind="conv2d", wide=False, residual=False, **settings):
        weight = torch.randn(outputs, inputs, *kernel, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        site = Site("l", kind, weight, bias, (1, inputs), (1, outputs), Activation("relu"), residual, **settings)
        target = None if wide else Scale(0.1, 0)
        return Int8Layer(site, unit, target, unit if residual and not wide else None).requires_grad_(False)

    same = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return [
        Part(Quantize(unit), (0,), True),
        Part(layer(20, 3, 3, 3, **same), (2,), False),
        Part(Pool8([3, 3], [2, 2], [1, 1]), (3,), True),
        Part(layer(20, 20, 3, 3, residual=True, **same), (4, 4), False),
        Part(Dequantize(unit), (5,), False),
        Part(layer(20, 20, 3, 3, residual=True, wide=True, **same), (5, 6), True),
        Part(Quantize(unit), (1,), False),
        Part(layer(9, 7, kind="linear", residual=False), (8,), False),
        Part(layer(9, 9, kind="linear", residual=True), (9, 9), True),
    ]


GIVEN = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(4)), torch.randn(4, 5, 7)


def one_by_one(parts, *given):
    known = list(given)
    for part in parts:
        known.append(part.module(*(known[value] for value in part.reads)))
    return [value for value, part in zip(known[len(given) :], parts, strict=True) if part.goes_out]


def test_a_graph_in_programs_has_the_bits_of_one_step_after_the_other(both):
    joined, plain = both
    steps = [part for part in joined.children() if isinstance(part, Program)]
    apart = [part for part in plain.modules() if type(part) in OF]
    assert sorted(type(part).__name__ for program in steps for part in program.parts) == sorted(
        type(part).__name__ for part in apart
    ), "every step is in a program"
    assert len(steps) < len(apart) / 3
    assert all(map(torch.equal, joined(X), plain(X)))


def test_a_program_has_the_bits_of_one_step_after_the_other():
    parts = chain()
    got, expected = Program(parts, 2)(*GIVEN), one_by_one(parts, *GIVEN)
    assert [(t.dtype, t.shape, t.stride()) for t in got] == [(t.dtype, t.shape, t.stride()) for t in expected]
    assert len(got) == 4
    assert all(map(torch.equal, got, expected))
    turned = GIVEN[0].contiguous(memory_format=torch.channels_last), GIVEN[1].transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, Program(parts, 2)(*turned), expected))


def test_every_level_and_two_threads_give_the_same_bits():
    code = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_runtime_program import GIVEN, Program, chain, one_by_one
parts = chain()
for images in (1, 9):
    given = GIVEN[0].repeat(images, 1, 4, 4), GIVEN[1].repeat(images, 3, 1)
    torch.set_num_threads(1); one = one_by_one(parts, *given)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, Program(parts, 2)(*given), one)), threads
print("same")
"""
    code = code.format(folder=__file__.rpartition("/")[0])
    for isa in ("torch", "generic", level()):
        done = fresh.run(code, environment={"MICROGLIA_ISA": isa, "OMP_NUM_THREADS": "2"})
        assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_a_program_is_plain_tensors_that_can_be_saved_and_copied(both):
    parts = chain()
    program = Program(parts, 2)
    expected = program(*GIVEN)
    state = load(save(program.state_dict()))
    emptied, replaced = copy.deepcopy(program), copy.deepcopy(program)
    for tensor in emptied.state_dict().values():
        tensor.zero_()
    with pytest.raises(RuntimeError, match="row pointers"):
        emptied(*GIVEN)
    emptied.load_state_dict(state)
    replaced.load_state_dict(state, assign=True)
    for other in (emptied, replaced, pickle.loads(pickle.dumps(program)), copy.deepcopy(program).to("cpu")):
        assert all(map(torch.equal, other(*GIVEN), expected))
    joined, plain = both
    assert len(joined.state_dict()) == len(plain.state_dict())
    assert all(map(torch.equal, copy.deepcopy(joined)(X), plain(X)))


def test_a_program_compiles_whole_and_exports():
    program = Program(chain(), 2)
    expected = program(*GIVEN)
    torch.testing.assert_close(torch.compile(program, fullgraph=True, backend="aot_eager")(*GIVEN), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.export.export(program, GIVEN).module()(*GIVEN), expected, rtol=0, atol=0)
    tensors = [tensor for part in program.parts for tensor in part.buffers()]
    given = list(GIVEN), tensors, program.steps, program.numbers
    torch.library.opcheck(torch.ops.microglia.int8_program.default, given, test_utils=("test_schema", "test_faketensor"))


def test_wrong_input_is_refused_as_by_the_single_steps():
    image, layer = GIVEN[0], Quantize(Scale(1.0, 0))
    small = [part._replace(reads=tuple(max(0, value - 1) for value in part.reads)) for part in chain()[:3]]
    for given in (image.double(), image[0]):
        said = []
        for call in (Program(small, 1), partial(one_by_one, small)):
            with pytest.raises(RuntimeError) as caught:
                call(given)
            said.append(str(caught.value).splitlines()[0])
        assert said[0] == said[1]
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        Program([Part(layer, (1,), False), Part(layer, (0,), False), chain()[8]._replace(reads=(2, 3))], 2)(
            torch.zeros(3, 9), torch.zeros(2, 9)
        )


@pytest.mark.skipif(level() == "torch", reason="the compiled operator checks its program")
def test_a_program_that_is_wrong_is_refused_in_words():
    program, size = Program(chain(), 2), len(Step._fields)
    tensors = [tensor for part in program.parts for tensor in part.buffers()]

    def changed(step, **settings):
        steps = list(program.steps)
        for name, number in settings.items():
            steps[step * size + Step._fields.index(name)] = number
        return steps

    run, numbers = torch.ops.microglia.int8_program, program.numbers
    for steps, said in (
        ([], "whole steps"),
        (program.steps[:-1], "whole steps"),
        (changed(0, input=2), "step 0 reads a value that is not there"),
        (changed(0, input=-1), "step 0 reads a value that is not there"),
        (changed(3, residual=5), "step 3 reads a value that is not there"),
        (changed(3, residual=-2), "step 3 reads a value that is not there"),
        (changed(1, kind=5), "no kind 5"),
        (changed(1, kind=-1), "no kind -1"),
        (changed(1, given=8), "lacks a tensor"),
        (changed(1, given=255), "not known"),
        (changed(1, outputs=40), "values must be|must be a contiguous"),
        (changed(8, kind=4), "leave 6 tensors"),
        (changed(6, kind=1, given=119, outputs=7), "uint8 CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=said):
            run(list(GIVEN), tensors, steps, numbers)
    with pytest.raises(RuntimeError, match="more tensors than there are"):
        run(list(GIVEN), tensors[:-1], program.steps, numbers)
    with pytest.raises(RuntimeError, match="3 numbers each"):
        run(list(GIVEN), tensors, program.steps, numbers[:-1])
    with pytest.raises(RuntimeError, match="must be an input"):
        run([], tensors, program.steps, numbers)
    assert len(run(list(GIVEN), tensors, program.steps, numbers)) == 4
