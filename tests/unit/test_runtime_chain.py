"""Chains of block convolutions: what the operator refuses, what a module of it is, and which layers of a graph become one."""

import copy
import operator
import pickle
import resource

import chains
import pytest
import torch
from kernel_matrix import Draw
from safetensors.torch import load, save
from test_runtime_kernels import BAD, HERE, process, site, sparse
from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.runtime import BlockChain, BlockConv2d, Link, RowConv2d
from microglia.runtime.dense.fusion import fuse
from microglia.runtime.plans import CHAINED, choices_of
from microglia.runtime.precisions import precision_of
from microglia.runtime.sparse_layers.chain import chained
from microglia.runtime.sparse_layers.chain_steps import Step, steps_of


def layer(outputs, inputs, kernel=3, *, activation="relu", bias=True, seed=0, **settings):
    x = torch.zeros(1, inputs, 9, 9)
    shift = torch.randn(outputs, generator=torch.Generator().manual_seed(seed)) if bias else None
    weight = sparse(outputs, inputs, kernel, kernel, seed=seed)
    settings = {"stride": (1, 1), "padding": (kernel // 2, kernel // 2), **settings}
    return BlockConv2d.of(site(weight, x, bias=shift, activation=activation, **settings), 1)


def bottleneck():
    """Two blocks with a residual each, the first of them with another shape beside it."""
    return [
        Link(layer(16, 24, 1), 0),
        Link(layer(17, 16, seed=1), 1),
        Link(layer(40, 24, 1, activation="none", seed=2), 0),
        Link(layer(40, 17, 1, seed=3), 2, 3),
        Link(layer(16, 40, 1, bias=False, seed=4), 4),
        Link(layer(40, 16, activation="silu", seed=5), 5, 4, goes_out=True),
    ]


def one_by_one(links, x):
    known = [x]
    for link in links:
        known.append(link.layer(known[link.input], None if link.residual is None else known[link.residual]))
    return [value for value, link in zip(known[1:], links, strict=True) if link.goes_out]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 3, 40, 400])
def test_a_chain_gives_the_bits_of_its_layers(batch):
    links, x = bottleneck(), torch.randn(batch, 24, 9, 9)
    links.insert(-1, Link(layer(24, 40, 1, seed=6), 4, 0, goes_out=True))  # adds the image itself
    links[-1] = links[-1]._replace(input=5)
    got, expected = BlockChain(links)(x), one_by_one(links, x)
    assert all(map(torch.equal, got, expected))
    out = got[-1]
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_results_that_go_out_are_also_read_inside():
    links, x = bottleneck(), torch.randn(2, 24, 9, 9)
    links[1], links[3] = links[1]._replace(goes_out=True), links[3]._replace(goes_out=True)
    got, expected = BlockChain(links)(x), one_by_one(links, x)
    assert len(got) == 3
    assert all(map(torch.equal, got, expected))


def test_what_a_call_left_behind_does_not_reach_the_next():
    """The buffers of a chain are used again: borders and channels past the last must be zeros whatever lay there."""
    last = BlockConv2d.of(site(sparse(16, 17, 3, 3, density=1.0), torch.zeros(1, 17, 9, 9), padding=(1, 1)), 8)
    wide, small = [Link(layer(17, 16), 0), Link(last, 1, None, True)], torch.randn(1, 16, 5, 5)
    expected = one_by_one(wide, small)[0]
    chain = BlockChain(wide)
    for side in (20, 3, 17):
        chain(torch.full((2, 16, side, side), torch.nan))
        assert torch.equal(chain(small)[0], expected)


def test_not_a_number_stays_with_its_image():
    links, x = bottleneck(), torch.randn(20, 24, 9, 9)
    x[7, 3, 4, 4] = torch.nan
    (out,), (expected,) = BlockChain(links)(x), one_by_one(links, x)
    assert out[7].isnan().any()
    assert not out[torch.arange(20) != 7].isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("which", [0, 1])
def test_hostile_indices_are_refused(bad, which):
    (name, (place, value)), *_ = bad.items()
    links = [Link(layer(48, 32), 0), Link(layer(32, 48), 1, None, True)]
    chain = BlockChain(links)
    before = getattr(links[0].layer, name).numel() if which else 0
    last = before + getattr(links[which].layer, name).numel()
    getattr(chain, name)[last + place if place < 0 else before + place] = max(value, 48) if value > 0 else value
    for batch in (1, 4):
        with pytest.raises(RuntimeError, match="block_chain"):
            chain(torch.randn(batch, 32, 7, 7))


@pytest.mark.usefixtures("two_threads")
def test_hostile_indices_are_refused_by_every_thread():
    chain = BlockChain([Link(layer(48, 32), 0), Link(layer(32, 48), 1, None, True)])
    chain.channel[-1] = 48
    for batch in (1, 2, 5, 64):
        with pytest.raises(RuntimeError, match="block_chain"):
            chain(torch.randn(batch, 32, 7, 7))


@pytest.mark.parametrize("first", [3, 9, 12, 15])
def test_blocks_may_begin_anywhere_and_reach_past_the_last_channel(first):
    wide = BlockConv2d.of(site(sparse(16, 16, 1, 1, density=1.0), torch.zeros(1, 16, 9, 9)), 8)
    wide.channel[0] = first
    wide.values[0, 16 - first :] = 0
    links, x = [Link(layer(16, 16), 0), Link(wide, 1, None, True)], torch.randn(3, 16, 6, 6)
    BlockChain([Link(layer(16, 16), 0), Link(layer(16, 16), 1, None, True)])(torch.full((1, 16, 20, 20), torch.nan))
    assert torch.equal(BlockChain(links)(x)[0], one_by_one(links, x)[0])


def test_a_large_dilation_on_one_axis_takes_no_room_on_the_other():
    settings = {"padding": (0, 512), "dilation": (1, 512)}
    x = torch.randn(1, 16, 1, 16000)
    weight = sparse(16, 16, 1, 3)
    links = [Link(BlockConv2d.of(site(weight, x, stride=(1, 1), **settings), 1), k, None, k == 3) for k in range(4)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert torch.equal(BlockChain(links)(x)[0], one_by_one(links, x)[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_a_padding_that_is_larger_than_the_image_is_copied():
    x = torch.randn(2, 16, 6, 6)
    weight = sparse(16, 16, 3, 3)
    far = {"padding": (40, 50), "dilation": (40, 50), "stride": (1, 1)}
    links = [Link(layer(16, 16), 0), Link(BlockConv2d.of(site(weight, x, **far), 1), 1, None, True)]
    assert torch.equal(BlockChain(links)(x)[0], one_by_one(links, x)[0])


STEPS = {
    "a value that is not there": {"input": 3},
    "its own result": {"input": 2},
    "a value below zero": {"input": -1},
    "a residual that is not there": {"residual": 2},
    "a residual of another shape": {"residual": 1},
    "a number past 32 bits": {"padding_height": 2**31},
    "a number far below zero": {"padding_height": -2},
    "no stride": {"stride_width": 0},
    "another kernel": {"kernel_width": 12},
    "an unknown activation": {"activation": 9},
    "blocks of no input": {"block_inputs": 0},
    "blocks of three inputs": {"block_inputs": 3},
    "more blocks than there are": {"blocks": 10**6},
    "fewer blocks than there are": {"blocks": 1},
    "more outputs than there are": {"outputs": 2**31 - 1},
    "a padding that no memory holds": {"padding_height": 2**30, "padding_width": 2**30},
    "a hidden result that no offset reaches": {"padding_height": 2**15, "padding_width": 2**15, "goes_out": 0},
}


@pytest.mark.parametrize("change", STEPS.values(), ids=STEPS)
def test_hostile_steps_are_refused(change):
    chain = BlockChain([Link(layer(48, 32), 0), Link(layer(32, 48), 1, None, True)])
    first, second = steps_of(chain.program)
    chain.program = [*first, *second._replace(**change)]
    with pytest.raises(RuntimeError, match=r"microglia|aten::empty"):
        chain(torch.randn(1, 32, 7, 7))


def test_tensors_of_another_kind_or_length_are_refused():
    links, x = bottleneck(), torch.randn(1, 24, 9, 9)
    for name, value in {
        "values": torch.zeros(3), "row_pointer": torch.zeros(40, dtype=torch.int64), "channel": torch.zeros(4),
        "bias": torch.zeros(5), "tap": torch.zeros(1, dtype=torch.uint8),
    }.items():  # fmt: skip
        chain = BlockChain(links)
        setattr(chain, name, value)
        with pytest.raises(RuntimeError, match="microglia"):
            chain(x)
    chain = BlockChain(links)
    for given in ((x.double(),), (x[0],), (x[:, :20],), (x[:, :, :0],)):
        with pytest.raises(RuntimeError, match="microglia"):
            chain(*given)
    for given in ((), (x, x)):
        with pytest.raises(MicrogliaError, match=r"called with 1 images, not with \d"):
            chain(*given)
    two = BlockChain([Link(layer(24, 24), 0), Link(layer(24, 24), 1, 2, True)], images=2)
    with pytest.raises(RuntimeError, match="of one batch"):
        two(x, torch.randn(2, 24, 9, 9))
    with pytest.raises(RuntimeError, match="shape of the output"):
        BlockChain([Link(layer(24, 24), 0, 1, True)], images=2)(x, x[:, :, :5])
    program, chain.program = chain.program, []
    with pytest.raises(RuntimeError, match="whole steps"):
        chain(x)
    chain.program = program[:-1]
    with pytest.raises(RuntimeError, match="whole steps"):
        chain(x)


def test_a_chain_is_of_block_convolutions_in_float32():
    x = torch.zeros(1, 8, 5, 5)
    row = RowConv2d.of(site(sparse(16, 8, 3, 3), x, padding=(1, 1)), 1)
    for links in ([], [Link(row, 0, None, True)], [Link(layer(16, 8).to(torch.bfloat16), 0, None, True)]):
        with pytest.raises(MicrogliaError, match="one or more block convolutions in float32"):
            BlockChain(links)


def test_links_that_do_not_fit_are_refused_in_words():
    for links, said in (
        ([Link(layer(16, 24), 1, None, True)], "asks for value 1; then there are 1"),
        ([Link(layer(16, 24), 0, 7, True)], "asks for value 7"),
        ([Link(layer(16, 24), 0, -1, True)], "asks for value -1"),
        ([Link(layer(16, 24), 0), Link(layer(16, 24), 1, None, True)], "asks value 1 for 24 channels; it has 16"),
        ([Link(layer(16, 24), 0, 0, True)], "asks value 0 for 16 channels; it has 24"),
        ([Link(layer(16, 24), 0)], "goes_out=True"),
    ):
        with pytest.raises(MicrogliaError, match=said):
            BlockChain(links)


def test_a_chain_is_plain_tensors_that_can_be_saved_and_copied():
    links, x = bottleneck(), torch.randn(2, 24, 9, 9)
    chain = BlockChain(links)
    (expected,) = chain(x)
    state = load(save(chain.state_dict()))
    fresh = BlockChain(links)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(chain).to("cpu"), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(other(x)[0], expected)
    for link, own in zip(links, chain.layers(), strict=True):
        assert torch.equal(own.dense(), link.layer.dense())
        assert own.values.untyped_storage().data_ptr() == chain.values.untyped_storage().data_ptr()
        given = torch.randn(1, own.inputs, 6, 6)
        assert torch.equal(own(given), link.layer(given))
    assert "6 layers" in repr(chain)


def test_a_chain_compiles_whole_and_exports():
    links, x = bottleneck(), torch.randn(2, 24, 9, 9)
    links[1] = links[1]._replace(goes_out=True)
    chain = BlockChain(links)
    expected = chain(x)
    torch.testing.assert_close(torch.compile(chain, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(chain, (x,)).module()(x), expected)
    weights = chain.values, chain.row_pointer, chain.channel, chain.tap, chain.bias
    operands = [x], *weights, chain.program
    torch.library.opcheck(torch.ops.microglia.block_chain.default, operands, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("isa", HERE[1:])
def test_two_threads_give_the_same_bits(isa):
    code = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_runtime_chain import bottleneck
from microglia.runtime import BlockChain
chain = BlockChain(bottleneck())
for batch in (1, 2, 3, 37):
    x = torch.randn(batch, 24, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1); one = chain(x)[0]
    torch.set_num_threads(2); assert torch.equal(chain(x)[0], one)
print("same")
"""
    done = process(code.format(folder=__file__.rpartition("/")[0]), MICROGLIA_ISA=isa, OMP_NUM_THREADS="2")
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize("seed", range(4))
def test_random_chains_equal_dense(seed):
    draw = Draw(seed)
    assert [found for _ in range(60) if (found := chains.wrong(draw))] == []


# ---------------------------------------------------------------------------------------------------------------- graphs
class Net(nn.Module):
    """A residual, a branch that something else reads, and a pooling between two runs of convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(3))
        self.down, self.last = nn.Conv2d(24, 40, 1, stride=2), nn.Conv2d(40, 16, 3)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(a) + x)
        c = self.third(b) + a
        pooled = nn.functional.max_pool2d(c, 2)
        d = self.last(torch.relu(self.down(pooled)))
        return d.mean((2, 3)), b.amax()


def graph_of(model, x, engine):
    return fuse(model.eval(), Example.of(x), engine)


def calls(graph):
    return [type(graph.get_submodule(str(node.target))) for node in graph.graph.nodes if node.op == "call_module"]


def test_layers_that_follow_each_other_become_chains():
    model, x = Net(), torch.randn(2, 24, 12, 12)
    graph = graph_of(model, x, lambda site: BlockConv2d.of(site, 1))
    expected = graph(x)
    assert chained(graph) is graph
    assert calls(graph) == [BlockChain, BlockChain]
    assert not any(isinstance(part, BlockConv2d) for part in graph.modules()), "the layers' own tensors stayed"
    assert all(map(torch.equal, graph(x), expected))
    first, second = (part for part in graph.modules() if isinstance(part, BlockChain))
    assert [Step(*step).goes_out for step in steps_of(first.program)] == [0, 1, 1]
    assert len(second.inputs) == 2
    assert all(map(torch.equal, copy.deepcopy(graph)(x), expected))


def test_a_name_that_is_taken_stays():
    model, x = nn.Sequential(), torch.randn(1, 24, 8, 8)
    for name, part in {"a": nn.Conv2d(24, 16, 3), "b": nn.Conv2d(16, 16, 3), "chain_0": nn.ConvTranspose2d(16, 16, 1)}.items():
        model.add_module(name, part)
    graph = graph_of(model, x, lambda site: BlockConv2d.of(site, 1))
    expected = graph(x)
    assert torch.equal(chained(graph)(x), expected)
    assert calls(graph) == [BlockChain]


def test_layers_of_another_kind_stay_between_the_chains():
    model, x = Net(), torch.randn(2, 24, 12, 12)

    def engine(site):
        return (RowConv2d if site.name == "second" else BlockConv2d).of(site, 1)

    graph = graph_of(model, x, engine)
    expected = graph(x)
    chained(graph)
    assert calls(graph) == [BlockConv2d, RowConv2d, BlockConv2d, BlockChain]
    assert all(map(torch.equal, graph(x), expected))
    taken = [node for node in graph.graph.nodes if node.target is operator.getitem]
    assert len(taken) == 1


def test_a_dense_layer_joins_the_chain_if_its_blocks_are_hardly_slower() -> None:
    def found(block: float) -> dict[str, tuple[None, float]]:
        return {"dense": (None, 1.0), "block 16x1": (None, block), "block 16x8": (None, block + 0.1)}

    chosen = choices_of([found(0.5), found(CHAINED), found(CHAINED + 0.01), {"dense": (None, 1.0)}], precision_of("float32"))
    assert chosen == {
        "sparse": ["block 16x1", "dense", "dense", "dense"],
        "sparse, chained": ["block 16x1", "block 16x1", "dense", "dense"],
    }
