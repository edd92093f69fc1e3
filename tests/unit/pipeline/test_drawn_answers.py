"""pipeline.drawing: photos that a JPEG cannot hold as they are."""

import io
from pathlib import Path

from PIL import Image

from corewise.pipeline import ClassAnswer
from corewise.pipeline.drawing import draw_answer

ANSWER = ClassAnswer(label="a long strip", probability=0.9, probabilities={"a long strip": 0.9})


def test_a_photo_that_is_longer_than_a_jpeg_may_be_is_drawn_smaller(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (40, 70_000), "white").save(content, "PNG")
    draw_answer(content.getvalue(), ANSWER, tmp_path / "drawn.jpg")
    with Image.open(tmp_path / "drawn.jpg") as drawn:
        assert drawn.size == (37, 65_500)
        assert min(drawn.convert("L").crop((0, 0, 37, 60)).getextrema()) < 120  # the name is on it


def test_a_comment_that_no_jpeg_can_hold_is_left_out(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("P", (80, 60)).save(content, "GIF", comment=b"x" * 100_000)
    assert len(Image.open(io.BytesIO(content.getvalue())).info["comment"]) == 100_000
    draw_answer(content.getvalue(), ANSWER, tmp_path / "drawn.jpg")
    with Image.open(tmp_path / "drawn.jpg") as drawn:
        assert "comment" not in drawn.info
