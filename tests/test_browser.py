"""The notebooks in JupyterLab, used as a reader does: in a browser, with the menu, the keyboard and the mouse.

`pytest -m browser` runs these tests. Each leaves screenshots in outputs/browser, or where the environment variable
LORA_LAB_SCREENSHOTS says.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from helpers.labs.clinic_cases import CASES

import nbformat
import pytest
from jupyter_core.paths import jupyter_path

try:
    from playwright.sync_api import expect
except ImportError:
    expect = None  # the fixture chromium skips the tests

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SCREENSHOTS = Path(os.environ.get("LORA_LAB_SCREENSHOTS", ROOT / "outputs" / "browser"))
MINUTES = 60_000  # in milliseconds; a limit only has to end what would never end
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"  # the one thing that a notebook loads from outside
BADGE_IMAGE = '<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"><rect width="100%" height="100%"/></svg>'
NOTEBOOK = "jupyterapp.shell.currentWidget"
# What a reader sees, so that no test of the notebook's content has to know JupyterLab's names for it.
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
SLIDERS = ".jp-OutputArea .widget-vbox:has(img.widget-image)"
PAGE = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab server of our own, with the notebooks as they are stored, and without outputs."""
    if importlib.util.find_spec("jupyterlab") is None:
        pytest.skip("needs JupyterLab: pip install -e '.[lab]'")
    folder = tmp_path_factory.mktemp("lab")
    for path in NOTEBOOKS.values():
        (folder / "root" / "stored").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "root" / "stored")
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / "root" / path.name)
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # cells outside the view are drawn as well
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    ours = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    ours |= {f"JUPYTER_{kind}_DIR": kind.lower() for kind in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | {name: str(folder / sub) for name, sub in ours.items()}
    env["JUPYTER_PATH"] = os.pathsep.join(jupyter_path())  # the extensions that are installed
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={folder / 'root'}", "--LabApp.expose_app_in_browser=True"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.news_url="]
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = _address(server, folder / "runtime", log)
        yield lambda name: f"{address}lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()  # the server ends its kernels
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _address(server, runtime, log):
    """Wait until the server has written down its port, and answers."""
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError):
                address = json.loads(file.read_text(encoding="utf-8"))["url"]
                urlopen(address + "static/favicons/favicon.ico", timeout=10).close()
                return address
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')}")


@contextlib.contextmanager
def opened(chromium, address):
    """Open a notebook in a page that reaches nothing outside, and collect the errors in the browser's console."""
    problems = []

    def serve(route):
        if route.request.url.startswith(address.split("lab/tree")[0]):
            route.continue_()
        elif route.request.url == BADGE:
            route.fulfill(content_type="image/svg+xml", body=BADGE_IMAGE)
        else:
            problems.append(f"asks for {route.request.url}")
            route.abort()

    def listen(message):
        if message.type == "error":
            problems.append(f"{message.text} ({message.location.get('url')})")

    page = chromium.new_page(viewport={"width": 1300, "height": 2000})
    page.set_default_timeout(5 * MINUTES)
    expect.set_options(timeout=5 * MINUTES)
    page.route("**/*", serve)
    page.on("console", listen)
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        page.goto(address)
        page.wait_for_function(f"window.jupyterapp && {NOTEBOOK}?.context?.isReady && {NOTEBOOK}.revealed")
        if page.locator("#jp-left-stack").is_visible():  # the list of files
            page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
        yield page, problems
        page.evaluate(f"{NOTEBOOK}.context.sessionContext.shutdown()")  # its kernel may hold gigabytes
    finally:
        page.close()


def set_theme(page, theme):
    page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
    page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=str(theme == "Light").lower())


def photograph(page, name):
    """Save the whole notebook in as many parts as it takes."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for old in SCREENSHOTS.glob(f"{name}_[0-9][0-9].png"):
        old.unlink()
    panel = page.locator(PAGE)
    height, view = panel.evaluate(
        """panel => {
            const end = [...panel.querySelectorAll(".jp-Cell")].pop().getBoundingClientRect().bottom;
            return [end - panel.getBoundingClientRect().top + panel.scrollTop, panel.clientHeight];
        }"""
    )
    for part, top in enumerate(range(0, int(height), view)):
        panel.evaluate("(panel, top) => { panel.scrollTop = top }", top)
        panel.screenshot(path=SCREENSHOTS / f"{name}_{part:02d}.png")


def looks_right(page):
    """Find what a reader would see go wrong: errors, formulas as source, missing or cut pictures, dead widgets."""
    page.wait_for_load_state("networkidle")
    assert page.locator(ERRORS).all_inner_texts() == []
    assert page.locator("mjx-merror").count() == 0
    assert page.locator(".jp-MarkdownCell:not(.jp-mod-rendered)").count() == 0, "a text cell is empty"
    prose = page.locator(".jp-RenderedMarkdown").evaluate_all(
        """cells => cells.map(cell => {
            const copy = cell.cloneNode(true);
            copy.querySelectorAll("code, mjx-container").forEach(part => part.remove());
            return copy.textContent;
        })"""
    )
    assert [text for text in prose if "$" in text or "\\" in text] == []
    assert page.get_by_text("Error displaying widget").count() == 0
    assert page.get_by_text("Loading widget").count() == 0
    pictures = page.locator(".jp-OutputArea img")
    shares = pictures.evaluate_all("all => all.map(image => image.naturalWidth && image.width / image.naturalWidth)")
    assert all(share > 0.6 for share in shares), "a picture is missing, or too small to read"
    wide = page.locator(".jp-OutputArea-output").evaluate_all(
        "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.innerText.slice(0, 200))"
    )
    assert wide == []
    return pictures.count()


@pytest.fixture(scope="module")
def after_run_all(request, chromium, lab):
    """A notebook after Run All from the menu, for all tests of it: opened and run once."""
    number = request.param
    with opened(chromium, lab(NOTEBOOKS[number].name)) as (page, problems):
        kernel = f"{NOTEBOOK}.context.sessionContext.session?.kernel"
        page.wait_for_function(f"{kernel}?.connectionStatus === 'connected' && {kernel}.status === 'idle'")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        page.wait_for_function(
            f"""() => {{
                const code = {NOTEBOOK}.content.model.toJSON().cells.filter(cell => cell.cell_type === "code");
                const failed = code.some(cell => cell.outputs.some(output => output.output_type === "error"));
                const status = {kernel}?.status;
                const over = failed || code.every(cell => cell.execution_count);
                return (status === "idle" && over) || !["idle", "busy"].includes(status);
            }}""",
            timeout=30 * MINUTES,
            polling=500,
        )
        yield number, page, nbformat.from_dict(page.evaluate(f"{NOTEBOOK}.content.model.toJSON()")), problems


@pytest.fixture
def run(after_run_all):
    """Its number, the page, and the notebook as JupyterLab holds it; at the end the console holds no error."""
    number, page, notebook, problems = after_run_all
    yield number, page, notebook
    assert problems == []


def with_notebooks(*numbers):
    return pytest.mark.parametrize("after_run_all", numbers, indirect=True)


@with_notebooks("00", "01", "02", "03", "07", "10")
def test_run_all(run):
    number, page, notebook = run
    stored = nbformat.read(NOTEBOOKS[number], as_version=4)
    photograph(page, f"{NOTEBOOKS[number].stem}_run")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    assert [cell.execution_count for cell in code] == [c.execution_count for c in stored.cells if c.cell_type == "code"]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == sum("image/png" in o.get("data", {}) for c in stored.cells for o in c.get("outputs", []))
    assert looks_right(page) == drawn + page.locator(SLIDERS).count()


@with_notebooks("01", "07")
def test_a_slider_redraws_by_keyboard_and_by_mouse(run):
    number, page, _ = run
    right, left_end = {"01": ("16", "1"), "07": ("128", "16")}[number]  # of the start, and of the slider
    box = page.locator(SLIDERS)
    slider = box.locator(".widget-hslider").first
    handle, readout = slider.locator(".noUi-handle"), slider.locator(".widget-readout")
    sentence = box.locator(".widget-html-content").last
    image = box.locator("img.widget-image")
    read_bytes = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"

    def seen(after=None):
        if after:
            expect(sentence).not_to_have_text(after[1])
            end = time.monotonic() + 60
            while image.evaluate(read_bytes) == after[0]:
                assert time.monotonic() < end, "the sentence has changed, and the figure has not"
                page.wait_for_timeout(100)
        picture = image.evaluate(read_bytes)
        assert bytes(picture[:4]) == b"\x89PNG"
        assert readout.inner_text() in sentence.inner_text()
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        return picture, sentence.inner_text(), readout.inner_text()

    handle.scroll_into_view_if_needed()
    first = seen()
    handle.focus()
    page.keyboard.press("ArrowRight")
    by_keyboard = seen(after=first)
    assert by_keyboard[2] == right
    box.screenshot(path=SCREENSHOTS / f"{NOTEBOOKS[number].stem}_slider_keyboard.png")
    page.keyboard.press("ArrowLeft")
    assert seen(after=by_keyboard) == first

    knob, track = handle.bounding_box(), slider.locator(".noUi-target").bounding_box()
    height = knob["y"] + knob["height"] / 2
    page.mouse.move(knob["x"] + knob["width"] / 2, height)
    page.mouse.down()
    page.mouse.move(track["x"] - 20, height, steps=10)
    expect(readout).to_have_text(left_end)
    page.wait_for_timeout(1000)
    assert sentence.inner_text() == first[1]  # redrawn when it is let go, not on the way
    page.mouse.up()
    by_mouse = seen(after=first)
    assert by_mouse[2] == left_end
    box.screenshot(path=SCREENSHOTS / f"{NOTEBOOKS[number].stem}_slider_mouse.png")


@with_notebooks("01", "02", "03", "07", "10")
def test_solutions_are_folded_and_open(run):
    number, page, notebook = run
    solutions = [i for i, cell in enumerate(notebook.cells) if "solution" in cell.metadata.get("tags", [])]
    assert solutions
    for i in solutions:
        cell = page.locator(".jp-Notebook .jp-Cell").nth(i)
        code = cell.locator(".cm-line")
        expect(code).to_have_count(0)
        cell.locator(".jp-InputPlaceholder").click()
        expect(code.first).to_be_visible()
        assert "\n".join(code.all_text_contents()) == notebook.cells[i].source
    cell.screenshot(path=SCREENSHOTS / f"{NOTEBOOKS[number].stem}_solution.png")


@with_notebooks("01", "07", "10")
def test_widgets_are_readable_in_both_themes(run):
    number, page, _ = run
    words = page.locator(".jp-OutputArea .jupyter-widgets").locator(
        ".widget-label, .widget-readout, .widget-html-content, .widget-radio-box label"
    )
    for theme in ("Dark", "Light"):
        set_theme(page, theme)
        contrasts = words.evaluate_all(
            """all => {
                const parts = color => color.match(/[0-9.]+/g).map(Number);
                const linear = value => value > 10 ? ((value / 255 + 0.055) / 1.055) ** 2.4 : value / 255 / 12.92;
                const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
                const behind = part => {
                    const color = parts(getComputedStyle(part).backgroundColor);
                    return color[3] === 0 ? behind(part.parentElement) : color;
                };
                return all.filter(part => part.innerText.trim()).map(part => {
                    const pair = [light(parts(getComputedStyle(part).color)), light(behind(part))];
                    return Math.max(...pair) / Math.min(...pair);
                });
            }"""
        )
        assert contrasts
        assert min(contrasts) >= 4.5, f"{theme}: text of a widget is hard to read (WCAG asks for 4.5)"
        picture = SCREENSHOTS / f"{NOTEBOOKS[number].stem}_widget_{theme.lower()}.png"
        page.locator(".jp-OutputArea .widget-vbox").first.screenshot(path=picture)


@with_notebooks("10")
def test_the_quiz_answers(run):
    number, page, _ = run
    quizzes = page.locator(".jp-OutputArea .widget-vbox:has(.widget-radio)")
    expect(quizzes).to_have_count(len(CASES))
    for quiz, case in zip(quizzes.all(), CASES, strict=True):
        answers = list(case.guesses)
        right, wrong = answers[case.right], answers[case.right - 1]
        buttons, feedback = quiz.get_by_role("radio"), quiz.locator(".widget-html-content").last
        assert buttons.count() == len(answers)
        assert [button.is_checked() for button in buttons.all()] == [False] * len(answers)
        quiz.get_by_label(wrong, exact=True).check()
        expect(feedback).to_have_text(f"Not this one. {case.guesses[wrong]}")
        quiz.get_by_label(right, exact=True).check()
        expect(feedback).to_have_text(f"Right. {case.guesses[right]}")
    quiz, buttons = quizzes.first, quizzes.first.get_by_role("radio")
    chosen = list(CASES[0].guesses)[1]
    buttons.first.focus()
    page.keyboard.press("Tab")
    expect(buttons.nth(1)).to_be_focused()
    page.keyboard.press("Space")
    expect(quiz.locator(".widget-html-content").last).to_contain_text(CASES[0].guesses[chosen])
    quiz.screenshot(path=SCREENSHOTS / f"{NOTEBOOKS[number].stem}_quiz.png")


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_a_stored_notebook_reads_well(number, chromium, lab):
    """Before anything runs: every formula is set, every figure there, and the dark theme does not swallow one."""
    path = NOTEBOOKS[number]
    notebook = nbformat.read(path, as_version=4)
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    figures = sum("image/png" in output.get("data", {}) for c in notebook.cells for output in c.get("outputs", []))
    with opened(chromium, lab(f"stored/{path.name}")) as (page, problems):
        page.wait_for_function(f"document.querySelectorAll('.jp-Cell').length === {len(notebook.cells)}")
        if "$" in prose:
            page.wait_for_selector("mjx-container")
        for theme in ("Light", "Dark"):
            set_theme(page, theme)
            photograph(page, f"{path.stem}_{theme.lower()}")
            assert looks_right(page) == figures
        see_through = page.locator(".jp-OutputArea img").evaluate_all(
            """all => all.filter(image => {
                const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
                canvas.drawImage(image, 0, 0);
                const pixels = canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
                return pixels.some((value, i) => i % 4 === 3 && value < 255);
            }).length"""
        )
        assert see_through == 0, "a figure without a background is black on black in the dark theme"
        assert problems == []
