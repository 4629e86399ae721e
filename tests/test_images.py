import io
import logging
import os
import shutil
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from modeling_tscir import images
from modeling_tscir.images import (
    BadImagesError,
    find_bad_images,
    handle_bad_images,
    list_images,
    load_image,
    middle,
    pad_to_aspect_ratio,
    to_rgb,
)


@pytest.fixture
def picture() -> Image.Image:
    """Four blocks of different colours, wider than high."""
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[:16, :24], pixels[:16, 24:] = (200, 30, 40), (30, 180, 60)
    pixels[16:, :24], pixels[16:, 24:] = (40, 60, 210), (230, 230, 230)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def far(image: Image.Image, other: Image.Image) -> float:
    assert image.mode == "RGB" and image.size == other.size
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_greyscale_palette_and_rgba_look_as_they_do_to_a_person(picture):
    assert far(load_image(encoded(picture, "png")), picture) == 0
    assert far(load_image(encoded(picture.convert("L"), "png")), picture.convert("L").convert("RGB")) == 0
    assert far(load_image(encoded(picture.convert("P", palette=Image.Palette.ADAPTIVE), "png")), picture) < 3
    assert far(load_image(encoded(picture.convert("RGBA"), "png")), picture) == 0
    assert far(load_image(encoded(picture.convert("1"), "png")), picture.convert("1").convert("RGB")) == 0
    assert far(load_image(encoded(picture.convert("LA"), "png")), picture.convert("L").convert("RGB")) == 0


def test_premultiplied_transparency_is_over_white_too(picture):
    clear = picture.convert("RGBA")
    clear.putalpha(128)
    grey = picture.convert("L").convert("LA")
    grey.putalpha(128)
    for given, plain in ((clear.convert("RGBa"), clear), (grey.convert("La"), grey)):
        assert far(to_rgb(given), to_rgb(plain)) < 1


def test_transparency_is_over_white(picture):
    clear = picture.copy().convert("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", picture.size, "white")
    assert far(load_image(encoded(clear, "png")), white) == 0
    palette = picture.convert("P")
    content = encoded(palette, "png", transparency=palette.getpixel((0, 0)))
    assert load_image(content).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk(picture):
    assert far(load_image(encoded(picture.convert("CMYK"), "jpeg", quality=98)), picture) < 6
    assert far(load_image(encoded(picture.convert("CMYK"), "tiff")), picture) < 2


@pytest.mark.parametrize("file_format", ["png", "tiff"])
def test_sixteen_bits_keep_their_brightness(picture, file_format):
    grey = picture.convert("L")
    wide = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    assert far(load_image(encoded(wide, file_format)), grey.convert("RGB")) < 1


def test_exif_rotation(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    stored = picture.rotate(90, expand=True)
    assert far(load_image(encoded(stored, "png", exif=exif)), picture) == 0
    grey = Image.fromarray(np.asarray(stored.convert("L"), dtype=np.uint16) * 257)
    assert far(load_image(encoded(grey, "png", exif=exif)), picture.convert("L").convert("RGB")) < 1


@pytest.mark.parametrize(("file_format", "mode"), [("png", "RGB"), ("png", "I;16"), ("webp", "RGB")])
def test_a_broken_exif_block_does_not_cost_a_whole_picture(picture, file_format, mode):
    stored = picture
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(picture.convert("L"), dtype=np.uint16) * 257)
    options = {"lossless": True} if file_format == "webp" else {}
    content = encoded(stored, file_format, exif=b"Exif\0\0garbage", **options)
    assert find_bad_images([content], ["a"]) == []
    assert (
        far(load_image(content), stored.convert("RGB") if mode == "RGB" else picture.convert("L").convert("RGB")) < 1
    )


@pytest.mark.parametrize(
    ("tag", "kind", "value"), [(0x0100, 2, b"abc\0"), (0x0128, 7, b"xx\0\0"), (0x011A, 2, b"ab\0\0")]
)
def test_a_tag_of_the_wrong_kind_does_not_cost_a_picture_that_is_turned(picture, tag, kind, value):
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI", tag, kind, 4) + value
    block = b"II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted(entries)) + struct.pack("<I", 0)
    stored = encoded(picture.rotate(90, expand=True), "png", exif=b"Exif\0\0" + block)
    assert find_bad_images([stored], ["a"]) == [] and far(load_image(stored), picture) == 0


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(picture, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture, kind, exif=exif)
    assert far(load_image(content), ImageOps.exif_transpose(Image.open(io.BytesIO(content)))) == 0
    opened = Image.open(io.BytesIO(content))
    assert load_image(opened).size == load_image(opened).size == load_image(content).size


def test_what_fails_while_it_is_turned_is_found_before(monkeypatch, picture):
    """What is checked is all that using a picture does."""
    monkeypatch.setattr("modeling_tscir.images.to_rgb", lambda image: 1 / 0)
    ((name, reason),) = find_bad_images([encoded(picture, "png")], ["a"])
    assert name == "a" and "decoded" in reason


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


def just_over_the_limit() -> bytes:
    return encoded(Image.new("1", (10_000, 9_000)), "png")


@pytest.fixture
def hostile(picture, tmp_path) -> dict[str, str]:
    whole = encoded(picture.resize((480, 320)), "jpeg")
    files = {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"not a picture", "not a picture"),
        "cut.jpg": (whole[: len(whole) // 2], "decoded"),
        "cut.png": (encoded(picture.resize((480, 320)), "png")[:200], "decoded"),
        "bomb.png": (bomb(), "bomb"),
        "large.png": (just_over_the_limit(), "bomb"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    return {name: reason for name, (_, reason) in files.items()} | {"gone.png": "missing"}


def test_every_bad_file_is_named_with_its_reason(hostile, picture, tmp_path):
    picture.save(tmp_path / "good.png")
    picture.save(tmp_path / "good.jpg")
    names = [*hostile, "good.png", "good.jpg"]
    bad = find_bad_images([str(tmp_path / name) for name in names], names)
    assert [name for name, _ in bad] == list(hostile)
    for name, reason in bad:
        assert hostile[name] in reason
        with pytest.raises(ValueError, match=hostile[name]):
            load_image(str(tmp_path / name))
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_image("http://127.0.0.1:9/closed.png")
    with pytest.raises(ValueError, match="cannot be fetched: nonnumeric port"):
        load_image("http://127.0.0.1:port/a.png")
    with pytest.raises(ValueError, match="no picture given"):
        load_image({"bytes": None, "path": None})
    with pytest.raises(BadImagesError) as caught:
        handle_bad_images(bad, len(names), "error")
    assert "7 of 9 pictures" in str(caught.value)
    assert all(name in str(caught.value) for name in hostile)
    handle_bad_images(bad, len(names), "skip")
    with pytest.raises(BadImagesError):  # nothing left to go on with
        handle_bad_images(bad, len(bad), "skip")
    with pytest.raises(ValueError, match="on_bad_image"):
        handle_bad_images(bad, 9, "ignore")


def test_folders(picture_folder, tmp_path):
    assert list_images(picture_folder) == ["0.png", "2.png", "4.png", "below/1.png", "below/3.png", "below/5.png"]
    (picture_folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (picture_folder / "below" / "loop").symlink_to(picture_folder, target_is_directory=True)
    (picture_folder / "a-link").symlink_to(picture_folder / "below", target_is_directory=True)  # found by its own name
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(picture_folder / "0.png", tmp_path / "elsewhere" / "7.png")
    os.mkfifo(tmp_path / "elsewhere" / "pipe.jpg")
    assert list_images(picture_folder)[-2:] == ["linked/7.png", "linked/pipe.jpg"]
    assert len(list_images(picture_folder)) == 8
    with pytest.raises(ValueError, match="no regular file"):
        load_image(picture_folder / "linked/pipe.jpg")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no picture"):
        list_images(tmp_path / "none")
    with pytest.raises(ValueError, match="not a folder"):
        list_images(tmp_path / "gone")
    (picture_folder / "itself").symlink_to("itself")
    with pytest.raises(ValueError, match="itself cannot be read: Too many levels"):
        list_images(picture_folder)


def test_pictures_of_formats_that_are_not_read_are_told(picture_folder, caplog):
    """As those that phones take."""
    for name in ("1.HEIC", "2.heic", "below/3.dng", "notes.txt"):
        (picture_folder / name).write_bytes(b"whatever")
    with caplog.at_level(logging.WARNING):
        assert len(list_images(picture_folder)) == 6
    assert "pictures that are not read, of formats unknown here, were left out: 2 .heic, 1 .dng" in caplog.text
    for name in picture_folder.rglob("*.png"):
        name.unlink()
    with pytest.raises(ValueError, match=r"holds no picture .*left out: 2 \.heic, 1 \.dng"):
        list_images(picture_folder)


def test_numbers_that_are_none_are_black(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[3, 3], values[4, 4] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "float.tiff")
    grey = np.asarray(load_image(tmp_path / "float.tiff"))[..., 0]
    assert grey[3, 3] == grey[4, 4] == 0 and grey[7, 7] == 255 and 120 < grey.mean() < 130


def test_a_picture_without_pixels_is_told(processor, pictures):
    """As a crop outside of a picture is."""
    nothing = pictures[0].crop((10, 10, 10, 30))
    with pytest.raises(ValueError, match="no pixels: 0 x 20"):
        processor(images=[pictures[0], nothing])
    assert find_bad_images([pictures[0], nothing], ["a", "b"]) == [("b", "no pixels: 0 x 20")]


def test_sixteen_bits_are_seen_through_where_they_say_so(tmp_path):
    values = np.full((8, 8), 30000, dtype=np.uint16)
    values[0, 0] = 5
    Image.fromarray(values).save(tmp_path / "clear.png", transparency=5)
    seen = np.asarray(load_image(tmp_path / "clear.png"))
    assert (seen[0, 0] == 255).all() and (seen[4, 4] == 117).all()


@pytest.mark.parametrize("size", [(30_000, 1), (3, 9001), (320, 10), (33, 2000)])
def test_only_the_middle_of_a_very_elongated_picture_is_enlarged(size):
    image = Image.new("RGB", size)
    found = middle(image)
    short, long = sorted(found.size)
    assert short == min(size) and 30 * short <= long <= 32 * short and (max(size) - long) % 2 == 0
    assert max(pad_to_aspect_ratio(image, 1.25).size) <= max(2048, 33 * min(size))


def test_a_picture_that_stands_twice_is_checked_once(tmp_path):
    """As two threads must not load one file."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    for _ in range(3):
        with Image.open(tmp_path / "a.png") as lazy:
            assert find_bad_images([lazy] * 8, list("abcdefgh")) == []
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with Image.open(tmp_path / "b.png") as broken:
        bad = find_bad_images([broken, tmp_path / "a.png", broken], ["x", "y", "z"])
    assert [name for name, _ in bad] == ["x", "z"] and bad[0][1] == bad[1][1]


def test_millions_of_pictures_are_checked_a_few_at_a_time(monkeypatch):
    """Each that waits takes more than a kilobyte."""

    class Many:
        def __len__(self):
            return 40_000

        def __getitem__(self, row):
            if row in (7, 39_999):
                raise ValueError("gone")
            return b""

    monkeypatch.setattr(images, "_decode_small", lambda source: None)
    names = range(40_000)
    tracemalloc.start()
    try:
        bad = find_bad_images(Many(), names)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bad == [(7, "gone"), (39_999, "gone")] and peak < 16 * 2**20
