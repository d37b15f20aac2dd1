"""A small data set on disk."""

from pathlib import Path

import pytest

from tests.support.quadruplet_files import image_bytes


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Four good rows whose images lie in tmp_path / images."""
    (tmp_path / "images").mkdir()
    made = []
    for i in range(4):
        for side in ("safe", "unsafe"):
            (tmp_path / "images" / f"{side}{i}.png").write_bytes(image_bytes(2 * i + (side == "unsafe")))
        made.append(
            {
                "safe_image": f"images/safe{i}.png",
                "unsafe_image": f"images/unsafe{i}.png",
                "safe_text": f"a red circle number {i}",
                "unsafe_text": f"a red circle number {i} on fire",
            }
        )
    return made
