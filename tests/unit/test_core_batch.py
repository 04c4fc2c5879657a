"""Trees of tensors: moved, counted, repeated, and handed to a model in one normal form."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from microglia.core.batch import Example, call, count_examples, repeat_example, take_examples, tensors_of, to_device
from microglia.core.errors import MicrogliaError
from microglia.core.running import Example as OldExample
from microglia.graph.dims.trace import arguments


class Pair(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - 2 * second


A, B = torch.arange(6.0).view(3, 2), torch.ones(3, 2)


@pytest.mark.parametrize("inputs", [(A, B), [A, B], {"second": B, "first": A}, UserDict(first=A, second=B)])
def test_a_model_is_called_by_position_or_by_keyword(inputs: object) -> None:
    assert torch.equal(call(Pair(), inputs), A - 2 * B)


def test_one_form_of_example_inputs_everywhere() -> None:
    assert OldExample is Example
    for inputs in (A, (A, B), {"first": A}, Example((A,), {})):
        args, kwargs = arguments(inputs)
        assert (args, kwargs) == (Example.of(inputs).args, Example.of(inputs).kwargs)
    with pytest.raises(MicrogliaError, match="not str"):
        Example.of("words")


def test_every_tensor_moves_and_nothing_else_changes() -> None:
    tree = {"x": A, "deep": [B, ("word", 3, None)], "other": UserDict(y=A)}
    moved = to_device(tree, "meta")
    assert [t.device.type for t in tensors_of(moved)] == ["meta"] * 3
    assert moved["deep"][1] == ("word", 3, None)
    assert to_device(A, "cpu") is A


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (A, 3),
        ({"masks": A, "n": 4}, 3),
        ((torch.tensor(1.0), B), 3),
        ([{"boxes": torch.zeros(7, 4)}, {"boxes": torch.zeros(0, 4)}], 2),  # one mapping an example, whatever it holds
        (["one", "two"], 2),
        (A[:0], 0),
        ([], 0),
    ],
)
def test_examples_are_counted(targets: object, count: int) -> None:
    assert count_examples(targets) == count


@pytest.mark.parametrize("targets", [torch.tensor(1.0), 3, {"a": 1}])
def test_what_cannot_be_counted_says_so(targets: object) -> None:
    with pytest.raises(MicrogliaError, match="count=function"):
        count_examples(targets)


def test_an_example_is_repeated_and_chosen_from() -> None:
    example = {"ids": torch.tensor([[5, 6]]), "scale": torch.tensor(2.0)}
    batch = repeat_example(example, 3)
    assert batch["ids"].tolist() == [[5, 6]] * 3
    assert batch["scale"] == 2.0
    assert torch.equal(repeat_example(A[:1], 4), A[:1].repeat(4, 1))
    assert torch.equal(take_examples((A, B), torch.tensor([2, 2]))[0], A[[2, 2]])
