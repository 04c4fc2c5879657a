"""Garbage collection is paused within the context, and afterwards as it was."""

from __future__ import annotations

import gc
import weakref

import pytest

from microglia.core.garbage import collection_paused


class Circle:
    """An object in a cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_collection_is_off_within_and_on_again_after_an_error() -> None:
    def fails() -> None:
        with collection_paused():
            seen.append(gc.isenabled())
            raise ValueError("stop")

    seen: list[bool] = []
    with pytest.raises(ValueError, match="stop"):
        fails()
    assert seen == [False]
    assert gc.isenabled()


def test_cycles_made_within_are_freed_at_the_end() -> None:
    with collection_paused():
        made = weakref.ref(Circle())
        assert made() is not None
    assert made() is None


def test_a_caller_without_collection_keeps_it_off() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
