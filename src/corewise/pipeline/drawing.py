"""Answers drawn on photos: boxes with names and scores, or the most probable classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corewise.common.phrases import percent
from corewise.pipeline.answers import ClassAnswer
from corewise.pipeline.boxes import Detection
from corewise.samples.image_files import open_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Okabe and Ito, Color universal design, 2008: colour-blind people can tell them apart too."""
NAMED = 3
"""Classes that are written on a photo."""
LINE, LETTERS = 400, 40
"""A line is this part of the mean side wide, at least 2 pixels, and letters are that part high, at least 11."""
QUALITY = 90
MOST_SIDE = 65_500
"""Pixels of a JPEG, by libjpeg; a longer photo is drawn smaller."""


def draw_answer(source: Path | bytes, answer: Any, path: Path) -> None:
    """Write the photo, upright, with its answer as a JPEG.

    Args:
        source: The photo's file, or its content.
        answer: A ``ClassAnswer``, or a list of ``Detection``.
        path: Where it goes.
    """
    opened = open_image(source)
    image = opened if opened.mode == "RGB" else opened.convert("RGB")
    drawn = boxes_on(image, answer) if isinstance(answer, list) else classes_on(image, answer)
    drawn.thumbnail((MOST_SIDE, MOST_SIDE))
    drawn.info.clear()  # Pillow would copy a comment, of which a JPEG cannot hold a long one
    drawn.save(path, "JPEG", quality=QUALITY)


def boxes_on(image: "Image", found: Sequence[Detection]) -> "Image":
    """An RGB image with a box for each object, the surest on top."""
    from PIL import ImageDraw

    made = image.copy()
    canvas = ImageDraw.Draw(made)
    width, height = _sizes(image)
    for one in reversed(found):
        colour, (left, top, right, bottom) = COLOURS[one.number % len(COLOURS)], one.box
        # A dark edge keeps a line visible on a background of its own colour.
        canvas.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black", width=width + 2)
        canvas.rectangle(one.box, outline=colour, width=width)
    for one in reversed(found):
        colour, (left, top, *_) = COLOURS[one.number % len(COLOURS)], one.box
        _tag(canvas, image.size, (left, top), f"{one.label} {percent(one.score)}", colour, height)
    return made


def classes_on(image: "Image", answer: ClassAnswer) -> "Image":
    """An RGB image with its most probable classes in the upper left corner."""
    from PIL import ImageDraw

    made = image.copy()
    canvas = ImageDraw.Draw(made)
    _, height = _sizes(image)
    top = 0.0
    for number, (label, probability) in enumerate(list(answer.probabilities.items())[:NAMED]):
        ground = COLOURS[3] if number == 0 else "white"
        top = _tag(canvas, image.size, (0, top), f"{label} {percent(probability, 1)}", ground, height, above=False)
    return made


def _sizes(image: "Image") -> tuple[int, int]:
    """The width of lines and the height of letters that can be seen and read on an image."""
    side = min((image.width + image.height) / 2, 2 * min(image.size))  # of a long strip, not half of its length
    return max(2, round(side / LINE)), max(11, round(side / LETTERS))


def _tag(
    canvas: "ImageDraw",
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    ground: str,
    height: int,
    *,
    above: bool = True,
) -> float:
    """Write on a coloured background, above the corner if there is room, inside the image; where it ends below."""
    from PIL import ImageColor, ImageFont

    font = ImageFont.load_default(height)
    wide, high = canvas.textlength(text, font) + height / 2, height * 1.35
    left = max(0.0, min(corner[0], size[0] - wide))
    top = corner[1] - high if above and corner[1] >= high else corner[1]
    top = max(0.0, min(top, size[1] - high))
    canvas.rectangle((left, top, left + wide, top + high), fill=ground)
    luminance = sum(
        weight * (channel / 255) ** 2.2
        for weight, channel in zip((0.2126, 0.7152, 0.0722), ImageColor.getrgb(ground)[:3], strict=True)
    )
    ink = "black" if luminance > 0.179 else "white"  # where WCAG's contrast with both is equal
    canvas.text((left + height / 4, top + high / 2), text, fill=ink, font=font, anchor="lm")
    return top + high
