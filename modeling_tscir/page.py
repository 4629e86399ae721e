"""A page in the browser over one gallery: choose or upload a picture, say the change, go on from what is found.

Only thumbnails of the gallery's own pictures are sent out; no path of this machine can be asked for.
"""

import os
import re
import time
from collections import deque
from collections.abc import Callable

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from transformers.utils import logging

from .files import printable
from .images import load_image, thumbnail
from .pipeline_tscir import ComposedImageRetrievalPipeline


logger = logging.get_logger(__name__)
MAX_UPLOAD_BYTES = 16 * 2**20
MAX_UPLOADS_A_MINUTE = 60
MAX_REQUEST_BYTES = 64 * 2**10
POSTED = ("/upload", "/queue/join", "/call/search", "/run/predict", "/cancel", "/reset")
MAX_WAITING = 32
MAX_TEXT = 500
MAX_RESULTS = 50
THUMBNAIL = 384
SAMPLES = 12
KEPT_SECONDS = 3600
TITLE = "Composed image retrieval"
CSS = "#steps { color: var(--body-text-color-subdued) }"


def small(gallery, name: str) -> Image.Image:
    """The thumbnail of an id. Raises `gr.Error` if the gallery no longer has it."""
    try:
        return thumbnail(gallery.source(name), THUMBNAIL)
    except KeyError as error:
        raise gr.Error(f"{printable(name)} is no longer in the gallery.", print_exception=False) from error


def upload(**options) -> gr.Image:
    """A place for a visitor's picture, which gives the path of what was uploaded, undecoded.

    Gradio's own way would open whatever path of this machine a request names, before we could look at it.
    """

    def preprocess(payload) -> str | None:
        if payload is None:
            return None
        folder, path = os.path.realpath(get_upload_folder()), os.path.realpath(payload.path or "")
        if os.path.commonpath([folder, path]) != folder or not os.path.isfile(path):
            raise gr.Error("This picture was not uploaded here.", print_exception=False)
        return path

    image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], **options)
    image.preprocess = preprocess  # a class of our own would make Gradio write a file beside this one
    kept = image.async_move_resource_to_block_cache

    async def uploaded_here(source) -> str | None:
        """Gradio fetches whatever public address a request names, of any size, before it comes to `preprocess`."""
        if str(source).lower().startswith(("http://", "https://")):
            raise gr.Error("This picture was not uploaded here.", print_exception=False)
        return await kept(source)

    image.async_move_resource_to_block_cache = uploaded_here
    return image


def uploaded(path: str | None) -> Image.Image | None:
    """What a visitor sent, decoded as any picture is. Raises `gr.Error` with the reason if it is none."""
    if path is None:
        return None
    try:
        return load_image(path)
    except ValueError as error:
        raise gr.Error(f"This picture cannot be used: {error}", print_exception=False) from error


def captioned(results: list[dict], names: bool = True) -> list[tuple[Image.Image, str]]:
    """Thumbnails of results, with their scores and, if asked, what else is known of them."""
    shown = []
    for result in results:
        if not names:
            shown.append((thumbnail(result["image"] or b"", THUMBNAIL), f"{result['score']:.3f}"))
            continue
        more = [f"{key}: {value}" for key, value in result["metadata"].items() if value is not None]
        more += [f"same as {printable(name)}" for name in result["duplicates"]]
        line = " · ".join([f"{result['score']:.3f} {printable(result['id'])}", *more])
        shown.append((thumbnail(result["image"] or b"", THUMBNAIL), line))
    return shown


def trail_of(steps: list[str]) -> str:
    """Names and texts on the way to a query, as Markdown that shows them as they are."""
    return " → ".join(re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", step) for step in steps)


def pictures(name: str, columns: int, height: int | None = None, value=None) -> gr.Gallery:
    """A row of pictures that can be clicked."""
    return gr.Gallery(
        value,
        columns=columns,
        height=height,
        elem_id=name,
        allow_preview=False,
        object_fit="contain",
        show_label=False,
        interactive=False,
        buttons=[],
    )


def make_page(cir: ComposedImageRetrievalPipeline) -> gr.Blocks:
    """The page of a pipeline that has indexed a [`Gallery`].

    Raises:
        ValueError: if it has indexed none, or an empty one.
    """
    gallery = cir.gallery
    if gallery is None or len(gallery) == 0:
        raise ValueError("the page needs a gallery with pictures: cir.index(Gallery.load(folder))")
    ids = gallery.ids
    samples = ids[:: max(1, len(ids) // SAMPLES)][:SAMPLES]
    own_weight = cir.model.config.composed_weight if cir.model.mapper is not None else 0.0

    def search(upload, chosen, text, second, weight, count):
        """Results, their ids, and the same query by picture alone and by text alone."""
        text = (text or "").strip()[:MAX_TEXT]
        first = uploaded(gallery.source(chosen) if chosen in gallery else upload) if chosen or upload else None
        other = uploaded(second)
        content = [part for part in (first, text or None, other) if part is not None]
        if not content:
            raise gr.Error("Choose or upload a picture, or write a text.", print_exception=False)
        given = [part for part in (first, other) if part is not None]
        queries = [{"content": content}]
        if given:
            queries.append({"image": given[0]})
        if text:
            queries.append({"text": text})
        try:
            own = [] if chosen is None else [chosen]
            moved = None if weight == own_weight else float(weight)  # else the model's own, for those that have one
            found = cir(queries, top_k=min(int(count), MAX_RESULTS), weight=moved, exclude=own)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        by_picture = captioned(found[1][:5], names=False) if given else []
        by_text = captioned(found[-1][:5], names=False) if text else []
        return captioned(found[0]), [result["id"] for result in found[0]], by_picture, by_text

    def go_on(steps, shown, text, event: gr.SelectData):
        """A result becomes the reference; the text is free for the next change."""
        if not 0 <= event.index < len(shown):
            raise gr.Error("That result is gone; search again.", print_exception=False)
        name = shown[event.index]
        steps = [*steps, *([f"“{text.strip()}”"] if (text or "").strip() else []), printable(name)]
        return name, small(gallery, name), "", steps, trail_of(steps)

    def choose(event: gr.SelectData):
        name = samples[event.index]
        return name, small(gallery, name), [printable(name)], trail_of([printable(name)])

    def forget_choice():
        return None, [], ""

    with gr.Blocks(title=TITLE, delete_cache=(600, KEPT_SECONDS), analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\nA picture and a change, among {len(gallery):,} pictures.")
        chosen, shown, steps = gr.State(None), gr.State([]), gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = upload(label="Picture", height=260, elem_id="picture")
                text = gr.Textbox(label="Change", placeholder="in red, with long sleeves", max_length=MAX_TEXT,
                                  elem_id="change")  # fmt: skip
                go = gr.Button("Search", variant="primary", elem_id="search")
                with gr.Accordion("More", open=False):
                    second = upload(label="Second picture: “… in the colour of …”", height=180, elem_id="second")
                    weight = gr.Slider(-1, 1, own_weight, step=0.05, label="Towards the picture (-1) or the text (1)")
                    count = gr.Slider(1, MAX_RESULTS, 10, step=1, label="Results")
            with gr.Column(scale=3):
                trail = gr.Markdown(elem_id="steps")
                gr.Markdown("**Results**: click one to go on from it")
                results = pictures("results", 5)
                with gr.Row():
                    with gr.Column():
                        gr.Markdown("By the picture alone")
                        by_picture = pictures("by-picture", 5, height=150)
                    with gr.Column():
                        gr.Markdown("By the text alone")
                        by_text = pictures("by-text", 5, height=150)
        gr.Markdown("Or begin with one of these:")
        starters = pictures("samples", SAMPLES, 130, [small(gallery, name) for name in samples])
        inputs = [image, chosen, text, second, weight, count]
        outputs = [results, shown, by_picture, by_text]
        # One encoding at a time: composing adapters are switched on and off on shared modules.
        alone = {"concurrency_id": "encode", "concurrency_limit": 1}
        gr.on([go.click, text.submit], search, inputs, outputs, api_name="search", **alone)
        results.select(go_on, [steps, shown, text], [chosen, image, text, steps, trail], api_name=False).then(
            search, inputs, outputs, api_name=False, **alone
        )
        starters.select(choose, None, [chosen, image, steps, trail], api_name=False).then(
            search, inputs, outputs, api_name=False, **alone
        )
        # Not by way of the queue: were it full, the next search would be by what was chosen before.
        gr.on([image.upload, image.clear], forget_choice, None, [chosen, steps, trail], api_name=False, queue=False)
    return page.queue(max_size=MAX_WAITING, api_open=False)  # else requests could pass the queue by


class Limits:
    """ASGI middleware: uploads of bounded size, so many a minute, and a queue of bounded length; beyond that, "busy".

    Nothing else that is posted is long, what the page has no use for is not there, and no page of another site posts.

    Args:
        is_full: whether the queue takes no more.
    """

    def __init__(self, app, is_full: Callable[[], bool]):
        self.app, self.is_full = app, is_full
        self.recent: deque[float] = deque()

    async def __call__(self, scope, receive, send):
        problem = None
        if scope["type"] == "http" and scope["method"] == "POST":
            path, headers = scope["path"].rstrip("/"), dict(scope["headers"])
            length = headers.get(b"content-length", b"")
            longest = MAX_UPLOAD_BYTES if path.endswith("/upload") else MAX_REQUEST_BYTES
            if not path.endswith(POSTED):
                problem = 404, "There is nothing here."
            elif is_from_elsewhere(headers):
                problem = 403, "This page alone may ask, and no other site's."
            elif not length.isdigit() or b"transfer-encoding" in headers:  # beside which a length does not count
                problem = 411, "A request must state its length."
            elif int(length) > longest:
                problem = 413, f"This may have at most {longest >> 10:,} KiB."
            elif path.endswith("/upload"):
                problem = self._too_many()
            elif path.endswith(("/queue/join", "/call/search")) and self.is_full():
                problem = 503, "Busy: too many searches are waiting; try again in a minute."
        if problem is None:
            await self.app(scope, receive, send)
            return
        status, text = problem
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"60")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def _too_many(self) -> tuple[int, str] | None:
        now = time.monotonic()
        while self.recent and now - self.recent[0] > 60:
            self.recent.popleft()
        if len(self.recent) >= MAX_UPLOADS_A_MINUTE:
            return 429, "Busy: too many uploads; try again in a minute."
        self.recent.append(now)
        return None


def is_from_elsewhere(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that another site's page asks. What is no browser says nothing of the kind.

    A browser that tells the site is believed, whatever host a proxy puts in the place of ours.
    """
    if b"sec-fetch-site" in headers:
        return headers[b"sec-fetch-site"] == b"cross-site"
    if b"origin" not in headers:
        return False
    names = b",".join(headers.get(name, b"") for name in (b"host", b"x-forwarded-host"))
    origin, *own = (re.sub(rb":\d+$", b"", name.strip()).lower() for name in (headers[b"origin"], *names.split(b",")))
    return origin.rpartition(b"://")[2] not in own


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = 7860, wait: bool = True) -> str:
    """Serve the page; until interrupted, if it is to wait.

    Mounting it on an application of one's own instead would leave out Gradio's check of what paths a visitor may name.

    Args:
        port: None takes any that is free.

    Returns:
        The page's address, once it is reachable.
    """
    limits = Middleware(Limits, is_full=lambda: len(page._queue) >= MAX_WAITING)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[],
        app_kwargs={"middleware": [limits], "docs_url": None, "redoc_url": None, "openapi_url": None},
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    if wait:
        print(address, flush=True)  # noqa: T201
        page.block_thread()
    return address
