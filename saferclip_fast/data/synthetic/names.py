"""Names that an option chooses from a list."""

from __future__ import annotations

from collections.abc import Sequence


def chosen_names(words: str, names: Sequence[str]) -> list[int]:
    """Places in `names` of the names that `words` joins with "+"; all of them for "".

    Raises ValueError for a name that is not there or comes twice; says which there are.
    """
    chosen = [word.strip() for word in str(words).split("+")] if words else list(names)
    if unknown := [word for word in chosen if word not in names]:
        raise ValueError(f"hazards={words}: {unknown[0]!r} is none; join some of {', '.join(names)} with +")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"hazards={words} has a name twice; join some of {', '.join(names)} with +")
    return [names.index(word) for word in chosen]
