"""cluster.bulk: where drawings may go."""

from pathlib import Path

import pytest

from corewise.cluster.bulk import _check_drawings
from corewise.common.errors import OutputError


@pytest.mark.parametrize("draw", ["photos", "photos/drawn", "photos/a/../../photos/a", "more"])
def test_drawings_do_not_go_among_the_inputs(tmp_path: Path, draw: str) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    files = [tmp_path / "photos" / "a" / "1.jpg", tmp_path / "more" / "2.jpg"]
    with pytest.raises(OutputError, match="is among the inputs; give another folder with --draw"):
        _check_drawings(tmp_path / draw, [tmp_path / "photos", files[1]], files)
    _check_drawings(tmp_path / "drawn", [tmp_path / "photos", files[1]], files)
