"""Results of a search to look at: one page that stands alone, or one picture."""

import base64
import contextlib
import functools
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .files import printable
from .gallery import Gallery
from .images import thumbnail


CELL = 224
LONGEST = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # pixels that such a file holds in height
STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
main { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 224px } figcaption { overflow-wrap: anywhere; font-size: 13px }
img { width: 224px; height: 224px; object-fit: contain; background: #f2f2f2 }
.query { display: flex; gap: 1rem; align-items: center; margin-bottom: 2rem }
.query img { width: 160px; height: 160px }
"""


def as_html_image(source) -> str:
    """An <img> with the picture in it."""
    buffer = io.BytesIO()
    thumbnail(source, CELL).save(buffer, "jpeg", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def write_html(path: Path, gallery: Gallery, content: Sequence, results: Sequence[dict]) -> None:
    """A page with its pictures within it. `content` is the query: texts, and {"image": source}."""
    query = "".join(
        f"<strong>{html.escape(part)}</strong>" if isinstance(part, str) else as_html_image(part["image"])
        for part in content
    )
    figures = []
    for result in results:
        more = [f"{key}: {value}" for key, value in result["metadata"].items() if value is not None]
        more += [f"same as {printable(name)}" for name in result["duplicates"]]
        lines = [f"{result['score']:.3f} {printable(result['id'])}", *more]
        caption = "<br>".join(html.escape(line) for line in lines)
        figures.append(
            f"<figure>{as_html_image(gallery.source(result['id']))}<figcaption>{caption}</figcaption></figure>"
        )
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Results</title><style>{STYLE}</style>\n'
        f'<div class="query">{query}</div>\n<main>{"".join(figures)}</main></html>\n',
        encoding="utf-8",
    )


def write_png(path: Path, gallery: Gallery, content: Sequence, results: Sequence[dict], columns: int = 5) -> None:
    """A contact sheet: the query in the first row, the results below it in reading order.

    Raises:
        ValueError: if the file's format does not hold as many.
    """
    text_height, margin = 36, 8
    width = margin + columns * (CELL + margin)
    height = margin + CELL + text_height + -(-len(results) // columns) * (CELL + text_height + margin)
    longest = LONGEST.get(path.suffix.lower(), height)
    if height > longest:
        raise ValueError(
            f"{path}: {len(results)} results make {height} pixels in height, of which it holds {longest}; name a .png "
            "file, or ask for fewer"
        )
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def place(number: int, top: int, image: Image.Image, lines: Sequence[str]) -> None:
        left = margin + number * (CELL + margin)
        sheet.paste(ImageOps.pad(image, (CELL, CELL), color="white"), (left, top))
        for row, line in enumerate(lines):
            draw.text((left, top + CELL + 2 + 16 * row), shortened(line, draw), fill="black", font=font(13))

    pictures = [part for part in content if not isinstance(part, str)][: columns - 1]
    for number, part in enumerate(pictures):
        place(number, margin, thumbnail(part["image"], CELL), ["query"])
    words = " ".join(part if isinstance(part, str) else "[picture]" for part in content)
    left = margin + len(pictures) * (CELL + margin)
    draw.multiline_text((left, margin + CELL // 3), wrapped(words, draw, width - left - margin), "black", font(18))
    for number, result in enumerate(results):
        top = margin + CELL + text_height + number // columns * (CELL + text_height + margin)
        lines = [f"{result['score']:.3f}", printable(result["id"])]
        place(number % columns, top, thumbnail(gallery.source(result["id"]), CELL), lines)
    sheet.save(path)


FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf", "segoeui.ttf")


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """One of the system's own that knows more letters than Pillow's, which has English ones alone."""
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def shortened(text: str, draw: ImageDraw.ImageDraw) -> str:
    """The text's end, where it is too long for a cell: names differ there."""
    if draw.textlength(text, font=font(13)) <= CELL:
        return text
    while text and draw.textlength("…" + text, font=font(13)) > CELL:
        text = text[1:]
    return "…" + text


def wrapped(text: str, draw: ImageDraw.ImageDraw, width: int) -> str:
    """The text in at most six lines of `width` pixels; "…" ends it where there are more."""

    def fits(line: str) -> bool:
        return draw.textlength(line, font=font(18)) <= width

    pieces = []
    for word in text.split():  # in languages without blanks a word may be longer than a line
        while len(word) > 1 and not fits(word):
            end = next((n for n in range(len(word) - 1, 1, -1) if fits(word[:n])), 1)
            pieces.append(word[:end])
            word = word[end:]
        pieces.append(word)
    lines = [""]
    for piece in pieces:
        longer = f"{lines[-1]} {piece}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(piece)
    return "\n".join([*lines[:5], f"{lines[5]} …"] if len(lines) > 6 else lines)
