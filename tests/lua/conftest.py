from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from consumers.lua.transformer import Transformer


@pytest.fixture
def transformer() -> Iterator[Callable[[str], Transformer]]:
    made: list[Transformer] = []

    def make(text: str) -> Transformer:
        made.append(Transformer(text))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def neighbour() -> Iterator[Transformer]:
    """Another consumer's transformer, at work all the while."""
    other = Transformer("function transform(action, record) return { seen = record.id } end")
    yield other
    other.close()
