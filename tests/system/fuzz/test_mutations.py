"""Every reader on valid files and on a few hundred damaged ones; `make fuzz` goes on from here for minutes."""

import random
import warnings

import pytest

from tests.system.fuzz.targets import TARGETS

MUTANTS = 150  # of each target


def mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 9, 34, 44, 45, 57, 123, 127, 128, 255))
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                del data[at : at + rng.randrange(1, 1 + len(data) // 2)]
            case _:
                begin = rng.randrange(len(data) + 1)
                data[at:at] = data[begin : begin + rng.randrange(64)]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_seeds_are_valid(target, tmp_path):
    for content in target.seeds():
        target(content)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_raise_what_is_documented(target):
    rng = random.Random(target.name)
    seeds = target.seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(MUTANTS):
            content = mutate(rng.choice(seeds), rng)
            try:
                target(content)
            except Exception as error:
                raise AssertionError(f"{target.name} on {content[:300]!r}") from error
