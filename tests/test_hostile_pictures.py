"""Two hundred files that ought to break an indexing, in one folder with some good ones."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from modeling_tscir import Gallery, GalleryError
from modeling_tscir import indexing as indexing_module


FORMATS = {
    "bmp": "BMP", "dib": "DIB", "gif": "GIF", "ico": "ICO", "j2k": "JPEG2000", "jpg": "JPEG", "pcx": "PCX",
    "png": "PNG", "ppm": "PPM", "tga": "TGA", "tif": "TIFF", "webp": "WEBP", "avif": "AVIF", "qoi": "QOI",
    "apng": "PNG",
}  # fmt: skip


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def broken_files() -> dict[bytes, bytes]:
    """Names and contents."""
    rng = random.Random(0)
    files: dict[bytes, bytes] = {}
    for extension, name in FORMATS.items():
        if name == "AVIF" and not features.check("avif"):
            continue
        buffer = io.BytesIO()
        picture().save(buffer, name)
        whole = buffer.getvalue()
        variants = {"half": whole[: len(whole) // 2], "head": whole[:12], "start": whole[:64], "tail": whole[40:]}
        variants["zeros"] = whole[:20] + bytes(len(whole) - 20)
        for number in range(7):
            flipped = bytearray(whole)
            for _ in range(8):
                flipped[rng.randrange(min(len(flipped), 200))] ^= 1 << rng.randrange(8)
            variants[f"flipped{number}"] = bytes(flipped)
        variants["noise"] = whole[:8] + rng.randbytes(400)
        files |= {f"{extension}-{kind}.{extension}".encode(): content for kind, content in variants.items()}
    files |= {
        b"bomb.png": png(60_000, 60_000),
        b"bomb wide.png": png(2**31 - 1, 1),
        b"lying.png": png(5000, 5000, b"\x00" * 100),
        b"bomb.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 99999, 99999, 1, 24, 0, 0, 0, 0, 0, 0),
        b"bomb.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
        b"script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nquit\n",
        b"page.png": b"<html><svg onload=alert(1)></svg></html>",
        b"svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"pickle.jpg": b"\x80\x04\x95\x00cos\nsystem\n(S'true'\ntR.",
        b"empty.jpg": b"",
        b"space.png": b" ",
        b"text.webp": "kein Bild".encode("utf-16"),
        b"zip.jpg": b"PK\x03\x04" + bytes(100),
    }
    return files


GOOD = [b"good.png", b"new\nline.png", b"tab\tbell\a.png", b"caf\xe9.png", "漢字 🙂.png".encode(), b"-rf.png",
        b"a" * 240 + b".png", b"%s %d {}.png", b"'; DROP TABLE.png", b"<script>.png", b"..png", b".hidden.png",
        b"\xff\xfe.png"]  # fmt: skip


@pytest.fixture
def hostile(tmp_path):
    root = os.fsencode(tmp_path / "hostile")
    os.mkdir(root)
    for name, content in broken_files().items():
        with open(os.path.join(root, name), "wb") as file:
            file.write(content)
    for number, name in enumerate(GOOD):
        if name == b"..png":
            name = b"..double.png"
        with open(os.path.join(root, name), "wb") as file:
            picture(number).save(file, "PNG")
    os.mkdir(os.path.join(root, b"folder.png"))
    os.mkdir(os.path.join(root, b"below"))
    os.symlink(root, os.path.join(root, b"below", b"loop"))
    os.symlink(os.path.join(root, b"below"), os.path.join(root, b"again"))
    os.symlink(b"nowhere.png", os.path.join(root, b"dangling.png"))
    os.symlink(b"itself.png", os.path.join(root, b"itself.png"))
    os.symlink(b"/dev/zero", os.path.join(root, b"zero.png"))
    os.mkfifo(os.path.join(root, b"pipe.png"))
    return os.fsdecode(root)


SPECIAL = {"dangling.png", "itself.png", "zero.png", "pipe.png"}


def test_every_hostile_file_gets_a_sentence_and_every_good_one_is_found(hostile, stage2, processor, tmp_path):
    assert len(broken_files()) + len(SPECIAL) + len(GOOD) + 2 >= 200
    gallery = Gallery.create(tmp_path / "g", stage2, processor)
    report = gallery.add(hostile, stage2, processor, progress=False)
    bad = {item["id"]: item["reason"] for item in report.unreadable}
    names = {os.fsdecode(name).encode("utf-8", "surrogateescape") for name in broken_files()}
    broken = {name.decode() for name in names}
    # Some flips leave a picture that decodes: those are in. Nothing is neither in nor named.
    assert len(gallery) + len(bad) == len(broken) + len(GOOD) + len(SPECIAL)
    assert not {*gallery.ids} & {*bad} and broken <= {*gallery.ids} | {*bad}
    assert len({*bad} & broken) > 120 and {*bad} >= SPECIAL
    for name, reason in bad.items():
        assert 3 < len(reason) < 300 and "\n" not in reason and "Traceback" not in reason, (name, reason)
    assert bad["bomb.png"].startswith("refused as a decompression bomb") and "known format" in bad["script.jpg"]
    assert report.linked == ["again", "below/loop"]
    assert len([i for i in gallery.ids if i not in broken]) == len(GOOD)
    assert {"caf\\xe9.png", "new\nline.png", "漢字 🙂.png", "\\xff\\xfe.png"} <= {*gallery.ids}
    for name in gallery.ids:
        assert gallery.picture(name).size[0] > 0
    for line in report.sentences():
        assert line.isprintable()
    again = gallery.add(hostile, stage2, processor, progress=False)
    assert again.unchanged == len(gallery) and again.added == again.changed == again.removed == 0
    assert again.unreadable == report.unreadable


def test_empty_missing_and_closed_folders(stage2, processor, tmp_path, picture_folder, monkeypatch):
    gallery = Gallery.create(tmp_path / "g", stage2, processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GalleryError, match="holds no picture"):
        gallery.add(tmp_path / "empty", stage2, processor)
    with pytest.raises(GalleryError, match="is not a folder"):
        gallery.add(tmp_path / "none", stage2, processor)
    with pytest.raises(GalleryError, match="is not a folder"):
        gallery.add(picture_folder / "0.png", stage2, processor)
    assert gallery.add(picture_folder, stage2, processor, progress=False).added == 6
    real = os.scandir
    below = os.fsencode(picture_folder / "below")

    def closed(folder):
        if folder in (below, denied[0]):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    denied = [b""]
    monkeypatch.setattr(indexing_module.os, "scandir", closed)
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    # A folder that is closed today may be open tomorrow: its pictures stay.
    assert len(gallery) == 6 and report.removed == 0
    assert report.unreadable == [{"id": "below", "reason": "a folder that cannot be read: Permission denied"}]
    denied[0] = os.fsencode(picture_folder)
    with pytest.raises(GalleryError, match="cannot be read: Permission denied"):
        gallery.add(picture_folder, stage2, processor, progress=False)
    assert len(Gallery(gallery.folder)) == 6
