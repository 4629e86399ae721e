"""The page of `tscir serve`: over HTTP as an attacker would call it, and in a browser as a visitor would."""

import io
import json
import os
import shutil
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from modeling_tscir import ComposedImageRetrievalPipeline, Gallery


pytest.importorskip("gradio")
import gradio as gr  # noqa: E402
import httpx  # noqa: E402

from modeling_tscir import page as page_module  # noqa: E402
from modeling_tscir.page import make_page, serve  # noqa: E402


CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


@pytest.fixture
def cir(stage2, processor, picture_folder, tmp_path) -> ComposedImageRetrievalPipeline:
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    return ComposedImageRetrievalPipeline(model=stage2, processor=processor).index(gallery)


@pytest.fixture
def address(cir, tmp_path, monkeypatch):
    """The page, served on a port of this machine."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    page = make_page(cir)
    yield serve(page, port=None, wait=False).rstrip("/")
    page.close()


def upload(address: str, content: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{address}/gradio_api/upload", files={"files": (name, content)}, timeout=30)


def search(address: str, image=None, text="", second=None, weight=0, count=3) -> dict:
    """The answer of the search endpoint: {"event", "data"} of its last message."""
    data = [image, text, second, weight, count]
    joined = httpx.post(f"{address}/gradio_api/call/search", json={"data": data}, timeout=30)
    if joined.status_code != 200:
        return {"event": "refused", "data": joined.text}
    found = httpx.get(f"{address}/gradio_api/call/search/{joined.json()['event_id']}", timeout=60).text
    lines = found.strip().splitlines()
    return {"event": lines[-2].removeprefix("event: "), "data": lines[-1].removeprefix("data: ")}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_search_over_http(address, pictures, picture_folder):
    path = upload(address, png(pictures[0])).json()[0]
    answer = search(address, {"path": path, "meta": {"_type": "gradio.FileData"}}, "red")
    assert answer["event"] == "complete", answer
    results, _, by_picture, by_text = json.loads(answer["data"])
    assert len(results) == len(by_picture) == len(by_text) == 3
    assert str(picture_folder) not in answer["data"]  # thumbnails of its own, not the gallery's files
    thumbnail = httpx.get(f"{address}/gradio_api/file={results[0]['image']['path']}")
    assert thumbnail.status_code == 200 and Image.open(io.BytesIO(thumbnail.content)).size == (48, 40)
    assert search(address, text="red")["event"] == "complete"
    assert search(address)["event"] == "error"


def test_no_path_of_this_machine_can_be_reached(address, picture_folder, cir, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hush", "utf-8")
    inside = cir.gallery.source("0.png")
    for path in (secret, "/etc/passwd", inside, cir.gallery.folder / "gallery.json",
                 f"{tmp_path}/uploads/../secret.txt", "../../../../etc/passwd", "%2e%2e/etc/passwd"):  # fmt: skip
        answer = httpx.get(f"{address}/gradio_api/file={path}", follow_redirects=True)
        assert answer.status_code in (403, 404) and b"hush" not in answer.content and b"root:" not in answer.content
        # Nor as the picture of a query, which would be decoded.
        for said in ({"meta": {"_type": "gradio.FileData"}}, {}):  # without it Gradio checks no path
            answer = search(address, {"path": str(path)} | said, "red")
            assert answer["event"] != "complete", (path, said)
    # Nor is anything fetched from this machine's own network.
    results = json.loads(search(address, text="red")["data"])[0]
    own = f"{address}/gradio_api/file={results[0]['image']['path']}"
    assert httpx.get(own).status_code == 200
    for picture in ({"path": own}, {"path": own, "url": own}, {"path": "x.png", "url": own}):
        answer = search(address, picture | {"meta": {"_type": "gradio.FileData"}}, "red")
        assert answer["event"] != "complete", picture


def test_nothing_is_fetched_from_elsewhere(address, pictures, monkeypatch):
    """Which Gradio would do for any public address, whole, whatever its size, before anything of ours looks at it."""
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    async def resolved(hostname: str) -> str:
        return "127.0.0.1"  # as if that were a public address

    monkeypatch.setattr("safehttpx.async_validate_url", resolved)
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for scheme in ("http", "HTTP"):
            said = f"{scheme}://example.org:{server.server_port}/x.png"
            for picture in ({"path": said}, {"path": "x.png", "url": said}, {"path": None, "url": said}):
                answer = search(address, picture | {"meta": {"_type": "gradio.FileData"}}, "red")
                assert answer["event"] != "complete", picture
        server.shutdown()
    assert not asked
    path = upload(address, png(pictures[0])).json()[0]
    assert search(address, {"path": path, "meta": {"_type": "gradio.FileData"}}, "red")["event"] == "complete"


def test_uploads_are_bounded_in_size_and_number(address, pictures, monkeypatch):
    assert upload(address, b"x" * (page_module.MAX_UPLOAD_BYTES + 1)).status_code == 413

    request = httpx.Request("POST", "http://page", files={"files": ("a.png", b"x" * 1000)})
    said = {"content-type": request.headers["content-type"], "transfer-encoding": "chunked"}
    for short in ({}, {"content-length": "100"}):  # which would not count, beside chunks
        chunks = iter([request.read()])
        endless = httpx.post(f"{address}/gradio_api/upload", content=chunks, headers=said | short, timeout=30)
        assert endless.status_code == 411
    long = {"data": [None, "red" * page_module.MAX_REQUEST_BYTES, None, 0, 3]}
    for route in ("call/search", "queue/join"):
        assert httpx.post(f"{address}/gradio_api/{route}", json=long, timeout=30).status_code == 413
    recording = {"file": ("a.webm", b"x")}
    for route in ("process_recording", "component_server", "nothing"):
        assert httpx.post(f"{address}/gradio_api/{route}", files=recording, timeout=30).status_code == 404
    content = png(pictures[0])
    monkeypatch.setattr(page_module, "MAX_UPLOADS_A_MINUTE", 5)
    codes = [upload(address, content).status_code for _ in range(7)]
    assert codes == [200] * 5 + [429] * 2 and "Busy" in upload(address, content).text


def test_other_sites_pages_cannot_post_in_a_visitors_name(address, pictures):
    def code(**headers) -> int:
        said = {name.replace("_", "-"): value for name, value in headers.items()}
        files = {"files": ("a.png", png(pictures[0]))}
        return httpx.post(f"{address}/gradio_api/upload", files=files, headers=said, timeout=30).status_code

    own, port, other = address, address.rpartition(":")[2], "http://evil.example"
    assert code() == code(origin=own) == code(origin=own, sec_fetch_site="same-origin") == 200
    assert code(origin=other) == code(origin="null") == code(origin=other, sec_fetch_site="cross-site") == 403
    assert code(origin=f"{other}:{port}") == 403
    # Behind a proxy: one that passes the host on, or names it, or neither, where only newer browsers can tell.
    public = "https://photos.example"
    assert code(origin=public, host="photos.example") == code(origin=public, x_forwarded_host="Photos.example") == 200
    assert code(origin=f"{public}:8443", x_forwarded_host="photos.example, inner:7860") == 200
    assert code(origin=public, sec_fetch_site="same-origin") == 200
    assert code(origin=other, host="photos.example", x_forwarded_host="photos.example") == 403


def bomb() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"nothing", b"", bomb(), b"<svg onload=alert(1)/>", b"%!PS-Adobe-3.0\nquit\n"])
def test_hostile_uploads_are_refused(address, content):
    path = upload(address, content).json()[0]
    answer = search(address, {"path": path, "meta": {"_type": "gradio.FileData"}}, "red")
    assert answer["event"] == "error" and "cannot be used" in answer["data"]
    assert search(address, text="red")["event"] == "complete"  # it lives on


def test_a_pipe_in_place_of_an_upload_does_not_hang_the_page(address, pictures, tmp_path):
    folder = os.path.dirname(upload(address, png(pictures[0])).json()[0])
    os.mkfifo(f"{folder}/pipe.png")
    assert search(address, {"path": f"{folder}/pipe.png"}, "red")["event"] == "error"
    assert search(address, text="red")["event"] == "complete"


def test_a_flood_is_queued_and_then_told_that_it_is_busy(address, cir, monkeypatch):
    slow = threading.Event()
    running = []
    real = type(cir).__call__

    def waiting(self, *args, **kwargs):
        running.append(1)
        assert len(running) == 1  # one encoding at a time
        slow.wait(30)
        running.pop()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(cir), "__call__", waiting)
    codes, texts = [], []
    for _ in range(page_module.MAX_WAITING + 8):
        joined = httpx.post(f"{address}/gradio_api/call/search", json={"data": [None, "red", None, 0, 3]}, timeout=30)
        codes.append(joined.status_code)
        texts.append(joined.text)
    assert codes.count(200) in (page_module.MAX_WAITING, page_module.MAX_WAITING + 1, page_module.MAX_WAITING + 2)
    assert codes[-1] == 503 and "Busy" in texts[-1]
    slow.set()
    time.sleep(2)
    assert search(address, text="red")["event"] == "complete"


def test_an_upload_is_what_is_searched_however_full_the_queue(address, pictures, monkeypatch):
    """What was chosen before is forgotten without waiting for a place."""
    config = httpx.get(f"{address}/config", timeout=30).json()
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    on = {(names.get(of), event): f["id"] for f in config["dependencies"] for of, event in f["targets"]}
    session = {"session_hash": "s"}

    def through_the_queue(fn: int, data: list, event_data=None) -> list:
        body = {"fn_index": fn, "data": data, "event_data": event_data, **session}
        assert httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=30).status_code == 200
        with httpx.stream("GET", f"{address}/gradio_api/queue/data", params=session, timeout=60) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:") or "{}") if line else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"]

    def search_uploaded() -> str:
        picture = {"path": upload(address, png(pictures[4])).json()[0], "meta": {"_type": "gradio.FileData"}}
        return through_the_queue(on["search", "click"], [picture, None, "", None, 0, 3])[0][0]["caption"]

    through_the_queue(on["samples", "select"], [], {"index": 0, "value": None})
    assert " 4.png" not in search_uploaded()
    body = {"fn_index": on["picture", "upload"], "data": [], **session}
    with monkeypatch.context() as full:
        full.setattr(page_module, "MAX_WAITING", 0)
        assert httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=30).status_code == 503
        assert httpx.post(f"{address}/gradio_api/run/predict", json=body, timeout=30).status_code == 200
    assert " 4.png" in search_uploaded()


def test_the_trail_shows_names_as_they_are():
    assert page_module.trail_of(["_a*b*_.png", "“<b>red</b> 5$”"]) == (r"\_a\*b\*\_\.png → “\<b\>red\<\/b\> 5\$”")


def test_an_empty_gallery_has_no_page(stage2, processor, tmp_path):
    cir = ComposedImageRetrievalPipeline(model=stage2, processor=processor)
    with pytest.raises(ValueError, match="needs a gallery"):
        make_page(cir)
    with pytest.raises(ValueError, match="needs a gallery with pictures"):
        make_page(cir.index(Gallery.create(tmp_path / "empty", stage2, processor)))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_visitor_searches_and_goes_on_from_a_result(address, cir, picture_folder, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run"]  # fmt: skip
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#samples img")
        assert page.locator("#samples img").count() == 6
        # An uploaded picture, changed by a text.
        page.set_input_files("#picture input[type=file]", str(picture_folder / "0.png"))
        page.wait_for_selector("#picture img")
        page.fill("#change textarea, #change input", "red")
        page.click("#search")
        page.wait_for_selector("#results img")
        page.wait_for_selector("#by-text img")
        expected = cir(image=picture_folder / "0.png", text="red", top_k=10)
        captions = page.locator("#results .caption-label").all_inner_texts()
        assert captions == [f"{r['score']:.3f} {r['id']}" for r in expected]
        # Go on from the second result with another text.
        second = expected[1]["id"]
        page.locator("#results button").nth(1).click()
        page.wait_for_function(f"document.querySelector('#steps').innerText.includes({json.dumps(second)})")
        page.fill("#change textarea, #change input", "that")
        page.click("#search")
        expected = [r["id"] for r in cir(image=picture_folder / second, text="that", exclude=[second])]
        page.wait_for_function(
            "wanted => JSON.stringify([...document.querySelectorAll('#results .caption-label')]"
            ".map(e => e.innerText.split(' ')[1])) == JSON.stringify(wanted)",
            arg=expected,
        )
        assert "“red”" in page.locator("#steps").inner_text()
        page.screenshot(path=os.environ.get("TSCIR_SCREENSHOT", str(tmp_path / "page.png")))
        assert problems == []
        browser.close()
    assert gr.__version__


def test_queries_are_the_models_own_unless_the_slider_moves(address, cir, pictures):
    """What the page finds first is what the pipeline finds."""
    page = make_page(cir)
    slider = next(block for block in page.blocks.values() if isinstance(block, gr.Slider) and block.minimum == -1)
    assert slider.value == cir.model.config.composed_weight == 0.2
    path = {"path": upload(address, png(pictures[0])).json()[0], "meta": {"_type": "gradio.FileData"}}
    for weight, told in ((0.2, {}), (0, {"weight": 0.0})):
        results = json.loads(search(address, path, "red", weight=weight, count=5)["data"])[0]
        wanted = cir(image=pictures[0], text="red", top_k=5, **told)
        assert [r["caption"].split()[:2] for r in results] == [[f"{w['score']:.3f}", w["id"]] for w in wanted]


@pytest.mark.parametrize("route", ["api/search", "run/search", "run/predict"])
def test_searches_cannot_pass_the_queue_by(address, route):
    data = {"data": [None, "red", None, 0, 3], "fn_index": 0}
    assert httpx.post(f"{address}/gradio_api/{route}", json=data, timeout=30).status_code == 404
