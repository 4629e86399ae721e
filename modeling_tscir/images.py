"""Pictures as a person sees them, whatever way they are stored; and a sentence for each that cannot be read."""

import contextlib
import functools
import http.client
import io
import os
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from transformers.utils import logging


logger = logging.get_logger(__name__)
EXTENSIONS = frozenset(
    (
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
        *(".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
    )
)
# Pictures that phones, cameras and drawing programs write and that are not read.
NOT_READ = frozenset(
    (
        *(".ai", ".arw", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".hif", ".jxl", ".nef", ".orf", ".raf"),
        *(".rw2", ".svg"),
    )
)
# Pillow hands these to other programs (Ghostscript, the operating system), or knows that they exist and no more.
REFUSED_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
UPRIGHT = dict(
    enumerate(
        (
            *(Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
            *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE),
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)  # by EXIF's orientation
MAX_ELONGATION = 32
PADDED_LINE = 2048
URL_TIMEOUT_SECONDS = 20
URL_MAX_BYTES = 64 * 2**20
PICTURES_AT_A_TIME = 4096  # that wait to be checked

ImageSource = str | os.PathLike | bytes | dict | Image.Image


SKIP_THEM = 'Repair or remove them, or go on without them with on_bad_image="skip" (--on_bad_image skip).'


class BadImagesError(ValueError):
    """Some pictures cannot be used. `.bad` lists all of them as (id, reason)."""

    def __init__(self, bad: Sequence[tuple[str, str]], total: int, remedy: str = SKIP_THEM):
        self.bad = list(bad)
        lines = "\n".join(f"  {name}: {reason}" for name, reason in self.bad)
        super().__init__(f"{len(self.bad)} of {total} pictures cannot be read:\n{lines}\n{remedy}")


def load_image(source: ImageSource, turned: bool = True) -> Image.Image:
    """Decode a picture to RGB: EXIF rotation applied, transparency over white, 16 bits scaled to 8, CMYK converted.

    Args:
        source: path, http(s) URL, encoded bytes, PIL image, or the {"bytes", "path"} of `datasets`.
        turned (`bool`): whether EXIF rotation is applied; not where boxes are of the pixels as they are stored.

    Raises:
        ValueError: with the reason, for anything that is not a whole picture; decompression bombs are refused.
    """
    with _failures_as_sentences():
        return to_rgb(_open(source), turned)


def load_named(image: ImageSource) -> Image.Image:
    """The picture. Raises `ValueError` with the file's name, if it has one."""
    try:
        return load_image(image)
    except ValueError as error:
        name = image.get("path") if isinstance(image, dict) else image
        if isinstance(name, (str, os.PathLike)):
            raise ValueError(f"{os.fspath(name)}: {error}") from error
        raise


@contextlib.contextmanager
def _failures_as_sentences() -> Iterator[None]:
    """Whatever Pillow raises over a bad file, as a `ValueError` that a person understands."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"refused as a decompression bomb: {error}; store it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a picture in any known format") from error
    except FileNotFoundError as error:
        raise ValueError("missing") from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise ValueError(f"cannot be fetched: {error}") from error
    except MemoryError as error:
        raise ValueError("too large for this machine's memory") from error
    except ValueError:
        raise
    except Exception as error:  # a broken file may take a decoder anywhere, to a KeyError or an AssertionError too
        raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error


def _open(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ValueError("no picture given")
    if is_url(source):
        source = _download(source)
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise ValueError(f"no picture: a {type(source).__name__} is neither a PIL image nor a path, URL or bytes")
    if isinstance(source, bytes):
        if not source:
            raise ValueError("empty")
        return _not_a_bomb(Image.open(io.BytesIO(source), formats=_formats()))
    if os.path.isfile(source):
        if os.path.getsize(source) == 0:
            raise ValueError("empty file")
    elif os.path.exists(source):
        raise ValueError("no regular file")  # opening a pipe would wait for ever
    return _not_a_bomb(Image.open(source, formats=_formats()))


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


def _not_a_bomb(image: Image.Image) -> Image.Image:
    # Pillow only warns below twice its limit, and turning warnings into errors is not safe among threads.
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"refused as a decompression bomb: {image.width} x {image.height} pixels; store it smaller")
    return image


def is_url(source: ImageSource) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def fetch(sources: Sequence[ImageSource], folder: str | os.PathLike) -> list[ImageSource]:
    """`sources` with each URL replaced by the file in `folder` it was fetched into; a URL that fails stays."""

    def fetched(number: int) -> ImageSource:
        if not is_url(sources[number]):
            return sources[number]
        path = os.path.join(folder, str(number))
        try:
            content = _download(sources[number])
        except (OSError, ValueError, http.client.HTTPException):
            return sources[number]  # whoever opens it next learns why
        Path(path).write_bytes(content)
        return path

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(fetched, range(len(sources))))


def _download(url: str) -> bytes:
    url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # as browsers do with blanks and letters beyond ASCII
    with urllib.request.urlopen(url, timeout=URL_TIMEOUT_SECONDS) as response:
        content = response.read(URL_MAX_BYTES + 1)
    if len(content) > URL_MAX_BYTES:
        raise ValueError(f"larger than {URL_MAX_BYTES} bytes")
    return content


def thumbnail(source: ImageSource, size: int) -> Image.Image:
    """A picture of at most `size` pixels a side; a grey one where it cannot be read."""
    try:
        image = load_image(source)
    except ValueError:
        return Image.new("RGB", (size, size), "lightgrey")
    image.thumbnail((size, size))
    return image


def to_rgb(image: Image.Image, turned: bool = True) -> Image.Image:
    """An opened picture as RGB, as a viewer would show it, or not `turned` as its EXIF block says."""
    if 0 in image.size:
        raise ValueError(f"no pixels: {image.width} x {image.height}")
    if turned:
        image = _upright(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.mode == "La":  # which Pillow turns into no other
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; one that cannot be read says nothing, and does not cost the picture."""
    image.load()  # Pillow turns TIFF files by itself as it reads their pixels, and takes the tag away
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever Pillow raises over such a block; what is wrong with the pixels was told above
        return image
    return image if turn is None else image.transpose(turn)


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0))
    white = 255.0 if image.mode == "I" and highest <= 255 else 65535.0  # mode I carries 8 or 16 bits in 32
    if image.mode == "F":
        white = highest or 1.0
    grey = Image.fromarray(np.clip(values * (255.0 / white), 0, 255).round().astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):  # the one value of a PNG that is seen through
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    return grey


def middle(image: Image.Image) -> Image.Image:
    """The middle of a very elongated picture, up to MAX_ELONGATION times as long as wide; any other as it is.

    CLIP sees the central square alone, but enlarges all of a picture first: 30,000 x 1 pixels to 6,720,000 x 224.
    """
    longest = MAX_ELONGATION * min(image.size)
    width, height = (side - 2 * ((side - min(side, longest) + 1) // 2) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_to_aspect_ratio(image: Image.Image, ratio: float) -> Image.Image:
    """Black added evenly to both ends of the shorter side, until the longer is at most `ratio` times as long."""
    if max(image.size) > MAX_ELONGATION * min(image.size):  # padded, it would be huge, and a line in the end
        share = min(1.0, PADDED_LINE / max(image.size))
        image = image.resize([max(1, round(side * share)) for side in image.size])
    shortest = round(max(image.size) / ratio)
    width, height = max(image.width, shortest), max(image.height, shortest)
    if (width, height) == image.size:
        return image
    padded = Image.new(image.mode, (width, height))
    padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return padded


class Selected(Sequence):
    """Some rows of a sequence of pictures, fetched when asked for."""

    def __init__(self, items: Sequence, rows: list[int]):
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        return self.items[self.rows[i]]


def list_images(folder: str | os.PathLike) -> list[str]:
    """Every file in `folder` and below that its name calls a picture, as sorted relative paths.

    Folders are followed through symbolic links, each once. Pictures of formats that are not read are told of.

    Raises:
        ValueError: if the folder does not exist, one below cannot be read, or there is no picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found, seen, others = [], set(), Counter()
    waiting, linked = [os.fspath(folder)], []
    while waiting or linked:
        place = waiting.pop() if waiting else linked.pop(0)  # links last, so that a folder goes by its own name
        if os.path.realpath(place) in seen:
            continue
        seen.add(os.path.realpath(place))
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{place} cannot be read: {error.strerror}") from error
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # such as a link to itself
                raise ValueError(f"{entry.path} cannot be read: {error.strerror}") from error
            if is_folder:
                (linked if entry.is_symlink() else waiting).append(entry.path)
            elif (kind := Path(entry.name).suffix.lower()) in EXTENSIONS:
                found.append(os.path.relpath(entry.path, root))
            elif kind in NOT_READ:
                others[kind] += 1
    found.sort()
    counts = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    left_out = f"pictures that are not read, of formats unknown here, were left out: {counts}" if others else ""
    if not found:
        raise ValueError(
            f"{folder} holds no picture ({', '.join(sorted(EXTENSIONS))})" + (left_out and f"; {left_out}")
        )
    if left_out:
        logger.warning(f"{folder}: {left_out}; store them as JPEG or PNG")
    return found


def dataset_pictures(rows, image_column: str):
    """A `datasets.Dataset` of its pictures alone, still encoded.

    Raises:
        ValueError: if these are several splits, a stream, or lack the column, or it holds no pictures.
    """
    from datasets import Image as ImageFeature  # only a Dataset brings us here, so datasets is there
    from datasets.table import CastError
    from pyarrow import ArrowException

    if isinstance(rows, dict):
        raise ValueError(f"these are several splits, {list(rows)}; index one of its splits, such as dataset['train']")
    if not hasattr(rows, "__len__"):
        raise ValueError(f"a stream ({type(rows).__name__}) has no rows to come back to; load it with streaming=False")
    if image_column not in rows.column_names:
        raise ValueError(f"the dataset has no column {image_column!r}; its columns are {rows.column_names}")
    try:
        plain = rows.with_format(None)  # of no format or transform, which would show other than what is stored
        return plain.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    except (ArrowException, CastError, TypeError) as error:
        found = rows.features[image_column]
        raise ValueError(f"column {image_column!r} of the dataset holds no pictures but {found}") from error


def find_bad_images(sources: Sequence[ImageSource], ids: Sequence[str]) -> list[tuple[str, str]]:
    """Decode every picture once, small where its format allows, and give (id, reason) of each that fails."""

    def reason(row: int) -> str | None:
        try:
            source = sources[row]  # which may decode it already, and fail
            if isinstance(source, Image.Image):
                load_image(source)
            else:
                _decode_small(source)
        except ValueError as error:
            return str(error)
        return None

    rows = first = range(len(sources))
    if isinstance(sources, (list, tuple)):  # in which one picture may stand twice, and two threads must not load it
        places: dict[int, int] = {}
        first = [places.setdefault(id(source), row) for row, source in enumerate(sources)]
        rows = sorted(set(first))
    bad: dict[int, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), PICTURES_AT_A_TIME):
            some = rows[start : start + PICTURES_AT_A_TIME]
            bad |= {row: why for row, why in zip(some, pool.map(reason, some), strict=True) if why is not None}
    return [(i, bad[row]) for i, row in zip(ids, first, strict=True) if row in bad]


def _decode_small(source: ImageSource) -> None:
    with _failures_as_sentences(), _open(source) as image:
        image.draft("RGB", (64, 64))  # JPEG alone decodes smaller; the whole file is still read
        to_rgb(image)


def handle_bad_images(
    bad: list[tuple[str, str]], total: int, on_bad_image: str, none_left: bool | None = None
) -> None:
    """Raise [`BadImagesError`], or with `on_bad_image="skip"` warn and go on.

    Not so if `none_left`, which unless told is where all of `total` are bad.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f'on_bad_image must be "error" or "skip", not {on_bad_image!r}')
    if not bad:
        return
    error = BadImagesError(bad, total)
    if on_bad_image == "error" or (len(bad) == total if none_left is None else none_left):
        raise error
    logger.warning(f"skipping {len(bad)} of {total} pictures: " + "; ".join(f"{i} ({why})" for i, why in bad))
