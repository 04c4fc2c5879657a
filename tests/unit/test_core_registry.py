"""The registry: names in order, no name twice, near misses named."""

import pytest

from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.core.registry import Registry, unknown_name


@pytest.fixture
def colours() -> Registry[int]:
    registry: Registry[int] = Registry("colour")
    registry.add("red")(1)
    registry.add("green")(2)
    return registry


def test_things_come_back_by_name_in_order(colours: Registry[int]) -> None:
    assert (colours["red"], colours["green"]) == (1, 2)
    assert list(colours) == ["red", "green"]
    assert list(colours.items()) == [("red", 1), ("green", 2)]
    assert "red" in colours
    assert "blue" not in colours


def test_add_hands_its_argument_back(colours: Registry[int]) -> None:
    assert colours.add("blue")(3) == 3


def test_a_name_is_given_once(colours: Registry[int]) -> None:
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        colours.add("red")(4)
    assert colours["red"] == 1


def test_an_unknown_name_is_answered_with_the_near_and_the_known(colours: Registry[int]) -> None:
    with pytest.raises(UnknownNameError, match=r"no colour named 'rad'\. Did you mean 'red'\? Known: green, red\.$"):
        colours["rad"]
    assert str(unknown_name("colour", 17, ["red"])) == "There is no colour named 17. Known: red."
    assert isinstance(unknown_name("colour", "x", []), MicrogliaError)


def test_a_name_that_is_known_and_not_built_is_answered_by_the_reason(colours: Registry[int]) -> None:
    colours.refuse("mauve", "take red.")
    with pytest.raises(UnknownNameError, match=r"^The colour 'mauve' is known and not built: take red\.$"):
        colours["mauve"]
    assert "mauve" not in colours
    assert list(colours) == ["red", "green"]
