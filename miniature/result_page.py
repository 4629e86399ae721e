"""Queries and what they retrieve, as a contact sheet and as a page."""

import base64
import html
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


class Row(NamedTuple):
    """One query: its reference picture and text, what was found, best first, and which of it was wanted."""

    reference: Path
    text: str
    found: list[Path]
    target: Path


CELL, GAP, TEXT_WIDTH, HEADER = 96, 8, 250, 30
GREEN, GREY, INK = (30, 160, 70), (205, 205, 210), (30, 30, 35)


def framed(path: Path, colour: tuple[int, int, int]) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL), colour)
    with Image.open(path) as picture:
        cell.paste(picture.convert("RGB").resize((CELL - 8, CELL - 8), Image.Resampling.NEAREST), (4, 4))
    return cell


def wrapped(text: str, font: ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def write_png(rows: list[Row], path: Path) -> None:
    """Reference, text, top results from left to right, and the target where it is not among them; target in green."""
    font = ImageFont.load_default(15)
    count = max(len(row.found) for row in rows)
    width = GAP + CELL + GAP + TEXT_WIDTH + (count + 1) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, HEADER + len(rows) * (CELL + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    left = CELL + TEXT_WIDTH + 2 * GAP
    draw.text((GAP, 8), "reference", INK, font)
    draw.text((CELL + 2 * GAP, 8), "modification", INK, font)
    draw.text((left, 8), f"top {count}, best first (target in green)", INK, font)
    draw.text((left + count * (CELL + GAP), 8), "missed", INK, font)
    for number, row in enumerate(rows):
        y = HEADER + number * (CELL + GAP)
        sheet.paste(framed(row.reference, GREY), (GAP, y))
        draw.multiline_text((CELL + 2 * GAP, y + 28), wrapped(row.text, font, TEXT_WIDTH - 2 * GAP), INK, font)
        for place, found in enumerate(row.found):
            sheet.paste(framed(found, GREEN if found == row.target else GREY), (left + place * (CELL + GAP), y))
        if row.target not in row.found:
            sheet.paste(framed(row.target, GREEN), (left + count * (CELL + GAP), y))
    sheet.save(path)


def write_html(rows: list[Row], path: Path) -> None:
    """The same as a page that needs no other file."""

    def picture(file: Path, kind: str = "") -> str:
        content = base64.b64encode(file.read_bytes()).decode()
        return f'<img class="{kind}" src="data:image/png;base64,{content}" alt="{html.escape(file.stem)}">'

    body = "\n".join(
        f"<tr><td>{picture(row.reference)}</td><td>{html.escape(row.text)}</td><td>"
        + "".join(picture(f, "target" if f == row.target else "") for f in row.found)
        + f"</td><td>{'' if row.target in row.found else picture(row.target, 'target')}</td></tr>"
        for row in rows
    )
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>TSCIR on the miniature world</title>
<style>
body {{ font: 16px sans-serif; margin: 2em; color: #1e1e23 }}
img {{ width: 96px; image-rendering: pixelated; border: 4px solid #cdcdd2; margin-right: 6px }}
img.target {{ border-color: #1ea046 }}
td, th {{ padding: 4px 12px; text-align: left }}
</style>
<h1>Composed image retrieval on the miniature world</h1>
<p>Stage II on evenly spaced queries of the test world. The wanted picture has a green frame.</p>
<table><tr><th>reference</th><th>modification</th><th>top results, best first</th><th>missed</th></tr>
{body}
</table></html>
""",
        encoding="utf-8",
    )
