"""The server's page in headless Chromium: what a person sees, by mouse, by keyboard and by drop, and what may go wrong.

The front and the replica are the real ones, the replica over the demo network in PyTorch; Ray is left out.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from dat_deploy.engine.passport import sha256
from dat_deploy.images.preprocess import Preprocessing, preprocess, read_image
from dat_deploy.runners.pytorch_runner import PytorchRunner
from dat_deploy.serving.own import replica as replica_module
from dat_deploy.serving.own.front import Front
from dat_deploy.serving.own.metrics import Metrics
from dat_deploy.serving.own.protocol import RequestError
from dat_deploy.serving.own.replica import Replica, Reply, ServedModel
from dat_deploy.serving.own.settings import ServeSettings
from dat_deploy.serving.tensors import TensorSpec
from dat_deploy.visualize import plotting

pytestmark = pytest.mark.server

BOOT = Path(__file__).parents[2] / "dat_deploy" / "data" / "ankle_boot.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 20.0  # a loaded machine is slow; nothing waits for long where all is well
MODEL = ServedModel(
    "demo",
    "pytorch:demo",
    sha256(b""),
    TensorSpec("image", "FP32", (-1, 3, 64, 64)),
    (TensorSpec("logits", "FP32", (-1, 10)),),
    most_images=1,
    most_pixels=1_000_000,
    most_call_pixels=1_000_000,
)

Canned = Reply | Exception | threading.Event


class ScriptedReplicas:
    """A replica, and before it asks the network, what `script` says instead: to answer, to raise, or to wait for."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.script: list[Canned] = []

    async def infer(self, body: bytes, header_length: str | None, seconds: float) -> Reply:
        return await self.replica.infer(body, header_length, seconds)

    async def classify(self, body: bytes, top: int, *, points: bool, seconds: float) -> Reply:
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Reply):
            return step
        if isinstance(step, Exception):
            raise step
        if step is not None:
            await asyncio.to_thread(step.wait, PATIENCE_S)
        return await self.replica.classify(body, top, points=points, seconds=seconds)


class Server:
    """The front over scripted replicas, on a port of its own."""

    def __init__(self, replica: Replica, *, port: int = 0, model: ServedModel = MODEL) -> None:
        self.replicas = ScriptedReplicas(replica)
        settings = ServeSettings(engine=model.engine, max_body_mb=0.1)
        self.front = Front(settings, model, {}, self.replicas, Metrics())
        self.front.ready = True
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.front.app, lifespan="off", log_config=None, ws="none"))
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def ask(self, picture: Path, points: int = 1) -> dict[str, Any]:
        """What classify says, asked without a browser."""
        address = f"{self.address}/v1/classify?top=5&points={points}"
        with urllib.request.urlopen(address, picture.read_bytes()) as response:  # noqa: S310 - our own server
            answer: dict[str, Any] = json.load(response)
        return answer


class Page:
    """A tab, over the DevTools protocol. Events are kept until the test looks at them."""

    def __init__(self, connection: ClientConnection, host: str) -> None:
        self._connection, self.host = connection, host
        self._number = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.resize(1000, 900)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = self._receive(PATIENCE_S)
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    def _receive(self, seconds: float) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._connection.recv(timeout=seconds))
        if "method" in message:
            self.events.append(message)
        return message

    def wait_for_event(self, method: str) -> dict[str, Any]:
        """The first such event that no one took yet."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for event in self.events:
                if event["method"] == method:
                    self.events.remove(event)
                    parameters: dict[str, Any] = event["params"]
                    return parameters
            self._receive(deadline - time.monotonic())

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_until(self, expression: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.js(expression):
            assert time.monotonic() < deadline, f"never: {expression}; the page says: {self.text('body')}"
            time.sleep(0.02)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_until(
            "document.readyState === 'complete' && !document.querySelector('#model').textContent.match(/…/)"
        )

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, **features: str) -> None:
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        common = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "rawKeyDown"} if text is None else {"type": "keyDown", "text": text}
        self.call("Input.dispatchKeyEvent", **common, **down, modifiers=8 * shift)
        self.call("Input.dispatchKeyEvent", **common, type="keyUp", modifiers=8 * shift)

    def choose(self, file: Path) -> None:
        """Give the file to the control, without its dialogue, and wait until it is on its way."""
        self.js("before = running")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
        self.wait_until("running !== before")

    def classify(self, file: Path) -> None:
        self.choose(file)
        self.wait_until_answered()

    def wait_until_answered(self) -> None:
        self.wait_until(
            "!!at('error').textContent || (!!at('status').textContent && !at('result').matches('.waiting'))"
        )

    def canvas(self) -> np.ndarray:
        """[H, W, 3] uint8 of the picture with its points."""
        content = base64.b64decode(self.js("at('canvas').toDataURL()").partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self, *, with_failed_requests: bool = False) -> list[str]:
        """Errors in the console, violations of the policy, and requests to other hosts."""
        self.js("new Promise(requestAnimationFrame)")  # what is on its way arrives
        found = []
        for event in self.events:
            match event:
                case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                    found.append(str(details))
                case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "warning"} as said}:
                    found.append(str(said))
                case {"method": "Log.entryAdded", "params": {"entry": entry}}:
                    if entry["source"] != "network" or with_failed_requests:
                        found.append(f"{entry['source']}: {entry['text']}")
                case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                    if not url.startswith((self.host, "data:", "blob:")):
                        found.append(f"request to {url}")
        return found


@pytest.fixture(scope="module")
def replica() -> Replica:
    """The demo network with its points, as a file exported with them gives."""
    return _replica(sampled_points=True)


def _replica(*, sampled_points: bool) -> Replica:
    runner = PytorchRunner("demo", "pytorch:demo", sampled_points=sampled_points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_module, "open_runner", lambda *_, **__: runner)
        patch.setattr(replica_module, "read_engine_file", lambda _: SimpleNamespace(content=b""))
        return Replica(MODEL, threads=1, wait_s=0)


@pytest.fixture(scope="module")
def shared_server(replica: Replica) -> Iterator[Server]:
    with contextlib.closing(Server(replica)) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    yield shared_server
    shared_server.replicas.script.clear()
    shared_server.front.in_progress = 0


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a browser's DevTools."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser to show the page in: none of {', '.join(BROWSERS)} is installed")
    folder = tmp_path_factory.mktemp("browser")
    options = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update "
    options += (
        "disable-dev-shm-usage disable-extensions disable-sync mute-audio hide-scrollbars remote-debugging-port=0"
    )
    command = [binary, *(f"--{option}" for option in options.split()), f"--user-data-dir={folder}", "about:blank"]
    with (folder / "output").open("wb") as output:
        browser = subprocess.Popen(  # noqa: S603 - the browser of this machine
            command, stdout=output, stderr=output, env={**os.environ, "HOME": str(folder)}, start_new_session=True
        )
    try:
        port_file = folder / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_S
        while not (port_file.exists() and port_file.read_text().count("\n")):
            alive = browser.poll() is None and time.monotonic() < deadline
            assert alive, f"{binary} does not start: {(folder / 'output').read_text()[-2000:]}"
            time.sleep(0.05)
        yield f"127.0.0.1:{port_file.read_text().splitlines()[0]}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()


@pytest.fixture
def new_page(devtools: str) -> Iterator[Callable[[str], Page]]:
    """Opens an address in a tab of its own."""
    with contextlib.ExitStack() as stack:

        def opened(address: str) -> Page:
            request = urllib.request.Request(f"http://{devtools}/json/new?about:blank", method="PUT")
            with urllib.request.urlopen(request) as response:  # noqa: S310 - the browser's own port
                target = json.load(response)
            connection = stack.enter_context(connect(target["webSocketDebuggerUrl"], max_size=None))
            page = Page(connection, address)
            stack.callback(page.call, "Page.close")
            page.open(address)
            return page

        yield opened


@pytest.fixture
def page(new_page: Callable[[str], Page], server: Server) -> Iterator[Page]:
    """The server's page; whatever a test does with it, nothing is in the console and nothing leaves the host."""
    opened = new_page(server.address)
    yield opened
    assert opened.complaints() == []


def reply(**changes: Any) -> Reply:
    """An answer of classify to a picture of 64×64 pixels, with 2 groups of 2 points."""
    content = {
        "model_name": "demo",
        "model_version": "1",
        "image": {"width": 64, "height": 64},
        "predictions": [{"index": 3, "name": "Dress", "probability": 0.75}],
        "preprocessing": {"resize_size": [64, 64], "image_size": [64, 64]},
        "sampled_points": [
            {
                "stage": 2,
                "block": 5,
                "points": [[[8, 16], [8, 48]], [[40, 16], [56, 40]]],
                "attention": [[0.5, 0.5], [0.8, 0.2]],
            }
        ],
    }
    return Reply(200, json.dumps(content | changes).encode())


def picture(folder: Path, name: str = "picture.png", colour: str = "black") -> Path:
    path = folder / name
    Image.new("RGB", (64, 64), colour).save(path)
    return path


def shown(page: Page) -> list[tuple[str, str]]:
    """Names and probabilities."""
    rows = page.js("[...document.querySelectorAll('li')].map((row) => row.innerText.split(/\\s*\\n\\s*/))")
    return [(name, share) for name, share in rows]


def written(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def test_the_top_five_are_those_of_classify(page: Page, server: Server) -> None:
    page.classify(BOOT)
    wanted = [(best["name"], written(best["probability"])) for best in server.ask(BOOT)["predictions"]]
    assert len(wanted) == 5
    assert shown(page) == wanted
    assert page.text("#status") == f"ankle_boot.png: {wanted[0][0]}, {wanted[0][1]}"
    widths = page.js("[...document.querySelectorAll('.bar i')].map((bar) => parseFloat(bar.style.width))")
    assert widths == pytest.approx([100 * best["probability"] for best in server.ask(BOOT)["predictions"]])


def test_the_model_is_described(page: Page) -> None:
    assert page.text("#model") == "Model demo · images of 64 × 64 pixels · 10 classes"
    assert page.js("document.title") == "demo · dat-deploy"
    assert page.js("document.documentElement.lang") == "en"


def test_the_palette_is_that_of_visualize(page: Page) -> None:
    assert page.js("COLOURS") == list(plotting._COLOURS)


def test_every_block_can_be_chosen_and_its_marks_have_the_groups_colours(page: Page, server: Server) -> None:
    page.classify(BOOT)
    pictures = []
    for block in server.ask(BOOT)["sampled_points"]:
        chosen = f"{block['stage']}-{block['block']}"
        page.js(f"document.querySelector('label[for=\"block-{chosen}\"]').click()")
        assert f"stage {block['stage']}, block {block['block']}" in page.js("at('canvas').getAttribute('aria-label')")
        pictures.append(page.canvas())
        colours = {tuple(colour) for colour in pictures[-1].reshape(-1, 3)}
        hidden = [group for group in range(len(block["points"])) if _rgb(group) not in colours]
        assert hidden == []
        assert _rgb(len(block["points"])) not in colours
    assert len({content.tobytes() for content in pictures}) == len(pictures) == 4
    assert page.js("document.querySelectorAll('#choice input').length") == 5
    assert page.js("document.querySelectorAll('#groups i').length") == 4


def test_marks_are_where_the_points_are_and_as_large_as_their_attention(
    page: Page, server: Server, tmp_path: Path
) -> None:
    server.replicas.script = [reply()]
    page.classify(picture(tmp_path))
    content = page.canvas()
    shot = page.js("[...at('canvas').getContext('2d').getImageData(0, 0, at('canvas').width, 1).data.slice(0, 4)]")
    assert shot[3] == 0  # around the picture there is nothing
    rows, columns = np.nonzero((content == 56).all(axis=-1))  # black, toned
    top, left = rows.min(), columns.min()
    scale = (columns.max() + 1 - left) / 64
    assert scale == pytest.approx((rows.max() + 1 - top) / 64, rel=0.01)
    radii = {}
    points = {(8, 16): 0, (8, 48): 0, (40, 16): 1, (56, 40): 1}  # y, x: group
    for (y, x), group in points.items():
        ours = np.argwhere((content == _rgb(group)).all(axis=-1)) - (top, left)  # y, x
        centre = np.array((y + 0.5, x + 0.5)) * scale
        mark = ours[np.hypot(*(ours + 0.5 - centre).T) < 12 * scale]
        np.testing.assert_allclose(mark.mean(axis=0) + 0.5, centre, atol=1)
        radii[y, x] = (len(mark) / np.pi) ** 0.5
    assert radii[8, 16] == pytest.approx(radii[8, 48], rel=0.05)
    assert radii[40, 16] / radii[56, 40] == pytest.approx(2, rel=0.1)  # the area is as the attention: 0.8 to 0.2
    assert radii[40, 16] ** 2 / radii[8, 16] ** 2 == pytest.approx(1.6, rel=0.15)


def test_the_picture_alone_is_the_crop_that_the_network_gets(page: Page, server: Server, tmp_path: Path) -> None:
    y, x = np.mgrid[0:120, 0:200]
    samples = np.stack([x * 255 // 199, y * 255 // 119, 255 - (x + y) * 255 // 318], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    path = tmp_path / "turned.png"
    Image.fromarray(samples).save(path, exif=exif)
    sizes = {"resize_size": [100, 80], "image_size": [80, 53]}  # the crop starts at 13.5, rounded to the even 14
    server.replicas.script = [reply(image={"width": 120, "height": 200}, preprocessing=sizes, sampled_points=[])]
    page.classify(path)
    assert page.text("#note") == ""
    rule = Preprocessing(image_size=(80, 53), resize_size=(100, 80), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    wanted = preprocess(read_image(path), rule).transpose(1, 2, 0) * 255
    drawn = np.asarray(Image.fromarray(page.canvas()).resize((53, 80), Image.Resampling.BOX), dtype=np.float32)
    assert np.abs(drawn - wanted).max() < 4  # the browser resizes in its own way; one pixel beside it would be 4 or 5
    assert not page.js("at('choice').checkVisibility()")


def test_alpha_is_dropped_as_the_network_does(page: Page, tmp_path: Path) -> None:
    half = Image.new("RGBA", (64, 64), (200, 100, 50, 128))
    half.save(tmp_path / "half.png")
    page.classify(tmp_path / "half.png")
    page.js("document.querySelector('label[for=block-none]').click()")
    assert page.text("#note") == ""
    np.testing.assert_allclose(page.canvas()[200, 200], (200, 100, 50), atol=2)
    half.paste((200, 100, 50, 0), (0, 0, 32, 32))
    half.save(tmp_path / "hole.png")
    page.classify(tmp_path / "hole.png")
    note = "Where it is wholly transparent the network sees the colours stored there, and this page does not."
    assert page.text("#note") == note


def test_the_keyboard_alone_reaches_and_operates_everything(page: Page, server: Server) -> None:
    page.call("Page.setInterceptFileChooserDialog", enabled=True)
    page.press("Tab")
    assert _focused(page) == "file"
    _assert_focus_is_seen(page)
    for key in ("Enter", " "):
        page.press(key)
        chooser = page.wait_for_event("Page.fileChooserOpened")
        server.replicas.script = [RequestError(503, "try again.")]
        page.call("DOM.setFileInputFiles", files=[str(BOOT)], backendNodeId=chooser["backendNodeId"])
        page.wait_until("!!at('error').textContent")
        page.press("Tab")
        assert _focused(page) == "again"
        _assert_focus_is_seen(page)
        page.press(key)
        page.wait_until_answered()
        assert shown(page)[0][0] == "Ankle boot"
        assert _focused(page) == "file"
    page.press("Tab")
    assert _focused(page) == "block-3-0"
    _assert_focus_is_seen(page)
    page.press("ArrowLeft")
    assert _focused(page) == "block-2-3"
    assert "stage 2, block 3" in page.text("#caption")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert _focused(page) == "block-none"
    _assert_focus_is_seen(page)
    page.press("Tab", shift=True)
    assert _focused(page) == "file"
    unnamed = "e.labels?.[0]?.innerText || e.ariaLabel || e.innerText"
    assert page.js(f"[...document.querySelectorAll('input, button')].filter((e) => !({unnamed})).length") == 0


def test_a_dropped_file_is_classified(page: Page) -> None:
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(BOOT)], "dragOperationsMask": 1}
        page.call("Input.dispatchDragEvent", type=kind, x=700, y=600, data=data)  # beside the drop zone
        assert page.js("document.body.className") == ("over" if kind == "dragOver" else "")
    page.wait_until_answered()
    assert shown(page)[0][0] == "Ankle boot"


def test_a_pasted_picture_is_classified(page: Page) -> None:
    page.js(f"""{{
        const bytes = Uint8Array.from(atob("{base64.b64encode(BOOT.read_bytes()).decode()}"), (c) => c.charCodeAt(0));
        const clipboardData = new DataTransfer();
        clipboardData.items.add(new File([bytes], "image.png", {{ type: "image/png" }}));
        dispatchEvent(new ClipboardEvent("paste", {{ clipboardData }}));
    }}""")
    page.wait_until_answered()
    assert page.text("#status").startswith("image.png: Ankle boot")


def test_what_is_no_file_is_refused(page: Page) -> None:
    page.classify(BOOT)
    page.js("dispatchEvent(new DragEvent('drop', { dataTransfer: new DataTransfer() }))")
    _assert_only_an_error(page, "That was no file. Save the picture first, or copy the picture itself.", again=False)


@pytest.mark.parametrize("case", ["400", "413", "429", "503", "500", "proxy"])
def test_an_error_is_a_sentence_and_takes_the_place_of_the_result(
    case: str, page: Page, server: Server, tmp_path: Path
) -> None:
    page.classify(BOOT)
    path = tmp_path / "next.png"
    path.write_bytes({"400": b"no image", "413": bytes(100_001)}.get(case, BOOT.read_bytes()))
    if case == "429":
        server.front.in_progress = 128
    server.replicas.script = {
        "503": [RequestError(503, "the engine's process died and is started anew; try again.")],
        "500": [RuntimeError("a bug")],
        "proxy": [Reply(502, b"<h1>Bad gateway</h1>")],
    }.get(case, [])
    page.classify(path)
    sentence = {
        "400": "image 'in the body' is no image that can be read: it starts with b'no image'; accepted are BMP, GIF, "
        "JPEG, PNG, PPM, TIFF and WEBP files. Convert it to PNG or JPEG, or copy it again.",
        "413": "the body is larger than the 100000 bytes that this server takes; send less at once.",
        "429": "128 requests are waiting, which is all this server takes; try again.",
        "503": "the engine's process died and is started anew; try again.",
        "500": "an error inside the server; its log says which.",
        "proxy": "the server answers 502 and says no more.",
    }[case]
    _assert_only_an_error(page, f"next.png was not classified: {sentence}", again=case in ("429", "503"))
    server.front.in_progress = 0
    page.classify(BOOT)
    assert page.text("#error") == ""
    assert shown(page)[0][0] == "Ankle boot"


def test_a_server_that_is_away_is_named_and_asked_again(new_page: Callable[[str], Page], replica: Replica) -> None:
    with contextlib.closing(Server(replica)) as server:
        page = new_page(server.address)
    page.classify(BOOT)
    reason = "the server gives no answer. It may have stopped, or end connections that send far too much."
    _assert_only_an_error(page, f"ankle_boot.png was not classified: {reason}", again=True)
    with contextlib.closing(Server(replica, port=server.port)):
        page.js("at('again').click()")
        page.wait_until_answered()
        assert shown(page)[0][0] == "Ankle boot"
    assert page.complaints() == []


def test_a_second_picture_ends_the_first_request(page: Page, server: Server, tmp_path: Path) -> None:
    release = threading.Event()
    server.replicas.script = [release]
    page.choose(picture(tmp_path))
    page.wait_until("at('status').textContent === 'Classifying picture.png…'")
    while server.front.in_progress == 0:
        time.sleep(0.01)
    page.classify(BOOT)
    assert page.wait_for_event("Network.loadingFailed")["canceled"]
    release.set()
    page.js("new Promise((done) => setTimeout(done, 200))")
    assert page.text("#status").startswith("ankle_boot.png: Ankle boot")
    assert page.text("#error") == ""


def test_an_engine_without_points_still_classifies_and_says_how_to_get_them(new_page: Callable[[str], Page]) -> None:
    with contextlib.closing(Server(_replica(sampled_points=False))) as server:
        page = new_page(server.address)
        page.classify(BOOT)
        wanted = [(best["name"], written(best["probability"])) for best in server.ask(BOOT, 0)["predictions"]]
        assert shown(page) == wanted
        assert page.text("#note") == "demo gives no sampled points. Export it with `sampling_locations=True` for them."
        assert page.js("at('canvas').checkVisibility() && !at('choice').checkVisibility()")
        assert page.canvas().max() > 200  # the picture, not toned
        assert page.complaints() == []


@pytest.mark.parametrize("suffix", ["tiff", "ppm"])
def test_a_picture_that_the_browser_cannot_draw_is_classified_without_it(
    suffix: str, page: Page, tmp_path: Path
) -> None:
    page.classify(BOOT)
    path = tmp_path / f"boot.{suffix}"
    Image.open(BOOT).save(path)
    page.classify(path)
    assert shown(page)[0] == ("Ankle boot", "95.2 %")
    assert page.text("#note") == "The browser cannot draw this picture as the server reads it, so it is not shown."
    assert not page.js("at('canvas').checkVisibility() || at('choice').checkVisibility()")


def test_text_from_the_server_and_of_files_is_text(
    new_page: Callable[[str], Page], replica: Replica, tmp_path: Path
) -> None:
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    with contextlib.closing(Server(replica, model=replace(MODEL, name=evil.replace("/", "")))) as server:
        page = new_page(server.address)
        assert evil.replace("/", "") in page.text("#model")  # an address has no slash in a name
        path = picture(tmp_path, "<img src=x onerror='window.hacked=1'>.png")
        server.replicas.script = [reply(predictions=[{"index": 0, "name": evil, "probability": 1.0}])]
        page.classify(path)
        assert shown(page) == [(evil, "100.0 %")]
        server.replicas.script = [RequestError(503, evil)]
        page.classify(path)
        assert page.text("#error") == f"{path.name} was not classified: {evil}"
        assert page.js("window.hacked === undefined && document.images.length === 0 && document.scripts.length === 1")
        assert page.complaints() == []


def test_complaints_are_seen(page: Page) -> None:
    """What all other tests rely on: the policy is in force, and what it forbids is noticed."""
    page.js(
        "console.error('one'); setTimeout(() => { throw new Error('two') }); new Image().src = 'http://192.0.2.1/a'"
    )
    page.wait_for_event("Runtime.exceptionThrown")
    found = "\n".join(page.complaints())
    assert "'one'" in found
    assert "violates the following Content Security Policy directive" in found
    page.events.clear()


def test_a_picture_classified_leaves_the_console_empty(page: Page) -> None:
    page.classify(BOOT)
    requested = [event["params"]["request"]["url"] for event in page.events if event["method"].endswith("BeSent")]
    assert f"{page.host}/v1/classify?top=5&points=1" in requested
    assert page.complaints(with_failed_requests=True) == []


@pytest.mark.parametrize("width", [320, 360, 768, 1400])
def test_nothing_is_wider_than_the_window(width: int, page: Page, server: Server, tmp_path: Path) -> None:
    page.resize(width, 800)
    long = "x" * 120
    blocks = [{"stage": 2, "block": i, "points": [[[8, 16]]] * 16, "attention": [[1.0]] * 16} for i in range(1, 24, 2)]
    server.replicas.script = [
        reply(predictions=[{"index": 0, "name": long, "probability": 1.0}], sampled_points=blocks),
        RequestError(503, long),
    ]
    for _ in range(2):
        page.classify(picture(tmp_path, f"{long}.png"))
        assert page.js("document.documentElement.scrollWidth") == width
        right = "[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right)"
        assert page.js(f"Math.max(...{right})") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme: str, page: Page, server: Server) -> None:
    page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    dark = page.js("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.classify(BOOT)
    result = _contrasts(page)
    assert {"Ankle boot", "95.2 %", "picture alone", "0"} <= result.keys()
    server.replicas.script = [RequestError(503, "sorry.")]
    page.classify(BOOT)
    errors = _contrasts(page)
    assert {"Try again", "ankle_boot.png was not classified: sorry."} <= errors.keys()
    assert {text: ratio for text, ratio in (result | errors).items() if ratio < 4.5} == {}


@pytest.mark.parametrize(("preference", "animations"), [("reduce", 0), ("no-preference", 5)])
def test_nothing_moves_for_who_wants_it_so(preference: str, animations: int, page: Page) -> None:
    page.media(prefers_reduced_motion=preference)
    page.js("started = 0; addEventListener('animationstart', () => { started += 1; })")
    page.classify(BOOT)
    page.js("new Promise((done) => setTimeout(done, 100))")
    assert page.js("started") == animations


def test_results_and_errors_are_announced(page: Page) -> None:
    """The regions are there, and not hidden, before anything is in them."""
    assert page.js("at('status').role || at('status').getAttribute('role')") == "status"
    assert page.js("at('error').role || at('error').getAttribute('role')") == "alert"
    assert page.js("[at('status'), at('error')].every((e) => getComputedStyle(e).display !== 'none')")


def _rgb(group: int) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(plotting._COLOURS[group][1:])
    return red, green, blue


def _focused(page: Page) -> str:
    return str(page.js("document.activeElement.id"))


def _assert_focus_is_seen(page: Page) -> None:
    """Hundreds of pixels differ from those without the focus."""
    with_focus, name = page.screenshot(), _focused(page)
    page.js("held = document.activeElement; held.blur()")
    without = page.screenshot()
    page.js("held.focus({ focusVisible: true })")
    assert _focused(page) == name
    pictures = [np.asarray(Image.open(io.BytesIO(shot)).convert("L"), dtype=int) for shot in (with_focus, without)]
    assert (np.abs(pictures[0] - pictures[1]) > 60).sum() > 200


def _assert_only_an_error(page: Page, sentence: str, *, again: bool) -> None:
    assert page.text("#error") == sentence
    assert page.text("#status") == ""
    assert not page.js("at('result').checkVisibility()")
    assert shown(page) == []
    assert page.js("at('again').checkVisibility()") == again


def _contrasts(page: Page) -> dict[str, float]:
    """Each text that is shown, and the ratio of its luminance to that of what is behind it."""
    found: dict[str, float] = page.js("""(() => {
        const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const luminance = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (e) => {
            const colour = getComputedStyle(e).backgroundColor;
            return (numbers(colour)[3] ?? 1) === 0 && e.parentElement ? behind(e.parentElement) : colour;
        };
        const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), ratios = {};
        while (texts.nextNode()) {
            const e = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
            if (!text || !e.checkVisibility({ visibilityProperty: true })) continue;
            const [low, high] = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort((a, b) => a - b);
            ratios[text] = Math.min(ratios[text] ?? 99, (high + 0.05) / (low + 0.05));
        }
        return ratios;
    })()""")
    return found
