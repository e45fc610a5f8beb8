"""The course as a web site: the pages against the files that they are made from, and in a browser.

`pytest -m site --slow` runs all of these tests, and `pytest --slow` those that need no browser.
"""

import base64
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

if not os.environ.get("CI"):  # there, what is missing is an error
    pytest.importorskip("latex2mathml", reason="needs the extra site")
    pytest.importorskip("sphinx_book_theme", reason="needs the extra site")
from bs4 import BeautifulSoup  # the theme depends on it

pytestmark = [pytest.mark.site, pytest.mark.slow]  # the build takes half a minute

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
COLAB = f"https://colab.research.google.com/github/{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks"
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise RuntimeError("the site is built without a network")
socket.socket.connect = socket.getaddrinfo = refuse
"""
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def build(root, target, folder):
    """Run the command of the README where no address can be reached."""
    (folder / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    command = [sys.executable, str(root / "docs" / "build.py"), str(target)]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run = build(ROOT, folder / "_site", folder)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [path.name for path in folder.iterdir() if path.suffix != ".py"] == ["_site"]
    return folder / "_site"


@pytest.fixture(scope="session")
def pages(site):
    """Each page, parsed."""
    files = [*site.glob("*.html"), *site.glob("notebooks/*.html")]
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in files}


@pytest.fixture
def article(site, pages, path):
    return pages[site / "notebooks" / f"{path.stem}.html"].find("article")


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def figures(cell):
    """Each picture of a cell, and the sentence printed after it."""
    for i, output in enumerate(cell.outputs):
        if "image/png" in output.get("data", {}):
            yield base64.b64decode(output.data["image/png"]), squeezed(cell.outputs[i + 1].text)


def squeezed(text):
    return " ".join(text.split())


def links(page):
    return [tag["href"] for tag in page.find_all("a", href=True)]


def assets(page):
    """What a browser loads together with a page."""
    found = [tag[name] for tag in page.find_all(True) for name in ("src", "data", "poster", "srcset") if tag.get(name)]
    return found + [tag["href"] for tag in page.find_all("link", href=True) if tag["rel"] != ["canonical"]]


def test_there_is_a_page_for_every_notebook_and_the_menu_lists_them_in_order(pages):
    names = ["index.html", *(f"{path.stem}.html" for path in NOTEBOOKS)]
    assert sorted(path.name for path in pages) == sorted([*names, "search.html"])
    for path, page in pages.items():
        entries = page.select(".bd-sidebar-primary li > a.reference.internal")
        assert [entry.get_text().strip()[:2] for entry in entries] == ["Lo", *(name[:2] for name in names[1:])]
        addresses = [path.name if entry["href"] == "#" else entry["href"].split("/")[-1] for entry in entries]
        assert addresses == names


def test_what_a_page_links_to_and_loads_is_in_the_site(site, pages):
    """No link or asset within the site is missing, and nothing is loaded from another server."""
    anchors = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    found = [(path, address) for path, page in pages.items() for address in assets(page)]
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        urls = re.findall(r"""url\(\s*["']?([^)"']+)|@import\s+["']([^"']+)""", text)
        found += [(path, "".join(url)) for url in urls]
    loaded = [(path, address) for path, address in found if not address.startswith(("data:", "#"))]
    linked = [(path, address) for path, page in pages.items() for address in links(page) if "://" not in address]
    assert len(linked) > len(pages) * len(NOTEBOOKS)
    for path, address in loaded + [pair for pair in linked if not urlsplit(pair[1]).scheme]:
        parts = urlsplit(address)
        assert not parts.netloc, f"{path.name} loads {address}"
        target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
        assert target.is_relative_to(site), f"{path.name}: {address}"
        assert target.is_file(), f"{path.name}: {address}"
        if parts.fragment and target in anchors:
            assert unquote(parts.fragment) in anchors[target], f"{path.name}: {address}"


@each_notebook
def test_a_page_shows_its_title_code_and_outputs_in_order(path, article):
    title = cells(path, "markdown")[0].source.splitlines()[0].removeprefix("# ")
    assert article.h1.get_text().rstrip("#") == title.replace("`", "")
    shown = [squeezed(block.get_text()) for block in article.find_all("pre")]
    for cell in cells(path):
        wanted = [cell.source] + ["".join(o.get("text", o.get("traceback", ""))) for o in cell.outputs]
        for text in filter(None, map(squeezed, wanted)):
            assert text in shown, text
            shown = shown[shown.index(text) + 1 :]


@each_notebook
def test_every_stored_figure_is_in_the_page_with_its_sentence(site, path, article):
    stored = [figure for cell in cells(path) for figure in figures(cell)]
    images = article.find_all("img")
    assert stored
    assert [((site / "notebooks" / tag["src"]).read_bytes(), tag["alt"]) for tag in images] == stored


@each_notebook
def test_solutions_are_folded_and_nothing_else_is(path, article):
    folded = article.find_all("details")
    assert not any(tag.has_attr("open") for tag in folded)
    assert {tag.summary.p.get_text() for tag in folded} <= {"Show the solution"}
    shown = [tag.find("pre").get_text().strip() for tag in folded]
    assert shown == [c.source.strip() for c in cells(path) if "solution" in c.metadata.get("tags", [])]


@each_notebook
def test_colab_and_download_lead_to_this_notebook(site, pages, path, article):
    page = pages[site / "notebooks" / f"{path.stem}.html"]
    colab = {address for address in links(page) if "colab" in address}
    assert colab == {f"{COLAB}/{path.name}"}
    assert article.find("a", href=f"{COLAB}/{path.name}").get_text() == "Open in Colab"
    assert article.find("a", download=path.name).get_text() == "Download the notebook"
    downloads = [tag["href"] for tag in page.find_all("a", href=re.compile(r"\.ipynb$")) if "://" not in tag["href"]]
    assert len(downloads) == 2  # in the text, and in the theme's menu
    for address in downloads:
        assert (site / "notebooks" / address).read_bytes() == path.read_bytes()


@each_notebook
def test_every_formula_is_typeset(path, article):
    source = "\n".join(re.sub(r"```.*?```|`[^`\n]+`", "", cell.source, flags=re.S) for cell in cells(path, "markdown"))
    assert len(article.find_all("math")) == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, flags=re.S)) > 0
    for formula in article.find_all("math"):
        assert "\\" not in formula.get_text(), formula  # an unknown command comes out as its name
    for tag in article.find_all(["math", "pre", "code", "annotation"]):
        tag.extract()
    assert not re.search(r"[$\\]", article.get_text())


def test_the_front_page_is_the_readme(site, pages):
    article = pages[site / "index.html"].find("article")
    pictures = [(site / tag["src"]).read_bytes() for tag in article.find_all("img")]
    assert pictures == [(ROOT / ".github/result.png").read_bytes()]
    shown = [tag.get_text().rstrip("#") for tag in article.find_all("h2")]
    assert shown == re.findall(r"^## (.+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert set(links(article)) >= {f"notebooks/{path.stem}.html" for path in NOTEBOOKS}


@pytest.fixture
def course(tmp_path):
    """A course of one page, to be broken."""
    root = tmp_path / "course"
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copyfile(ROOT / "pyproject.toml", root / "pyproject.toml")
    readme = "# A course\n\n| 00 | [One](notebooks/00_one.ipynb) |\n|---|---|\n"
    (root / "README.md").write_text(readme, encoding="utf-8")
    code = nbformat.v4.new_code_cell(f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()")
    (root / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# One"), code])
    notebook.metadata = nbformat.read(NOTEBOOKS[0], as_version=4).metadata
    nbformat.write(notebook, root / "notebooks" / "00_one.ipynb")
    return root


FAULTS = {
    "[one](absent.ipynb)": "absent.ipynb",
    "[two](#absent)": "'absent'",
    "![three](absent.png)": "image file not readable: notebooks/absent.png",
    "$\\absent{4}$": r"formula '\\absent{4}'",
    "$\\frac{5$": r"formula '\\frac{5'",
    "$\\left( 6$": r"formula '\\left( 6'",
    "#### seven": "Non-consecutive header level",
}


def test_a_build_executes_nothing_and_replaces_an_earlier_site_only_when_it_is_whole(course, tmp_path):
    site, notebook = course / "_site", course / "notebooks" / "00_one.ipynb"
    assert build(course, site, tmp_path).returncode == 0
    assert (site / "notebooks" / "00_one.html").is_file()
    (site / "old.html").touch()
    sound = notebook.read_text(encoding="utf-8")
    faulty = json.loads(sound)
    faulty["cells"][0]["source"] = "\n\n".join(["# One", *FAULTS])
    notebook.write_text(json.dumps(faulty), encoding="utf-8")
    run = build(course, site, tmp_path)
    assert run.returncode != 0
    for text, warning in FAULTS.items():
        assert warning in run.stderr, f"{text}\n{run.stderr}"
    assert (site / "old.html").exists()
    notebook.write_text(sound, encoding="utf-8")
    assert build(course, site, tmp_path).returncode == 0
    assert not (site / "old.html").exists()
    assert not (tmp_path / "executed").exists()


def test_a_notebook_that_the_readme_leaves_out_and_a_foreign_folder_are_refused(course, tmp_path):
    run = build(course, course, tmp_path)
    assert "is not a site built by this command; choose another folder" in run.stderr
    shutil.copyfile(course / "notebooks" / "00_one.ipynb", course / "notebooks" / "01_two.ipynb")
    run = build(course, course / "_site", tmp_path)
    assert "the table of notebooks does not name each file" in run.stderr
    assert not (course / "_site").exists()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    """The site, served as on GitHub Pages: below a folder with the name of the repository."""
    handler = functools.partial(_Quiet, directory=site.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/_site"
        server.shutdown()


@contextlib.contextmanager
def opened(chromium, address, width=1280, **options):
    """A page that reaches only the site, and has had no error in its console at the end."""
    problems = []
    with chromium.new_context(viewport={"width": width, "height": 900}, **options) as context:
        page = context.new_page()
        page.on("console", lambda entry: problems.append(entry.text) if entry.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(address) else problems.append(request.url))
        yield page
        assert not problems


PAGES = ["index.html", *(f"notebooks/{path.stem}.html" for path in NOTEBOOKS)]


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_and_its_formulas_are_typeset(chromium, address, name):
    with opened(chromium, address) as page:
        page.goto(f"{address}/{name}", wait_until="networkidle")
        loaded = "[...document.images].filter(image => !image.complete || image.naturalWidth < 10).length"
        page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        page.wait_for_function(f"{loaded} === 0")
        if page.locator("math").count():
            fonts = page.evaluate(
                "document.fonts.ready.then(all => [...all].filter(f => f.status == 'loaded').map(f => f.family))"
            )
            assert "STIX Two Math" in [font.strip('"') for font in fonts]
            # A fraction drawn as one: its parts are above and below each other.
            for fraction in page.locator("mfrac").all():
                upper, lower = (part.bounding_box() for part in fraction.locator(":scope > *").all())
                assert upper["y"] + upper["height"] <= lower["y"] + 1


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_a_page_without_scrolling_it_sideways(chromium, address, name):
    with opened(chromium, address, width=390, is_mobile=True, has_touch=True) as page:
        page.goto(f"{address}/{name}", wait_until="networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("window.innerWidth") == 390
        # Nothing is cut off: what is wider than the screen lies in something that scrolls.
        cut = page.evaluate(
            """() => [...document.querySelectorAll("article *")].filter(tag => {
                if (tag.getBoundingClientRect().right <= 391 || tag.closest("math, summary, .headerlink")) return false;
                for (let box = tag; box; box = box.parentElement)
                    if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return false;
                return true;
            }).map(tag => tag.outerHTML.slice(0, 200))"""
        )
        assert cut == []


@pytest.mark.browser
def test_the_search_finds_a_word_of_a_notebook(chromium, address):
    with opened(chromium, address) as page:
        page.goto(f"{address}/index.html")
        page.keyboard.press("Control+k")
        page.keyboard.type("absmax")
        page.keyboard.press("Enter")
        page.locator("#search-results a", has_text="What is NF4?").click()
        page.wait_for_url("**/07_quantization.html*")


@pytest.mark.browser
def test_the_folder_works_without_a_server(chromium, site):
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(f"{site.as_uri()}/search.html?q=absmax")
        page.locator("#search-results a", has_text="What is NF4?").click()
        page.locator("article math").first.wait_for()
        assert page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px \"STIX Two Math\"'))")


@pytest.mark.browser
def test_a_solution_opens_by_mouse_and_by_keyboard(chromium, address):
    with opened(chromium, address) as page:
        page.goto(f"{address}/notebooks/01_lora_math.html")
        first, second = page.locator("details").all()[:2]
        assert not first.locator("pre").first.is_visible()
        first.locator("summary").click()
        assert "def best_rank_r" in first.locator("pre").first.inner_text()
        second.locator("summary").press("Enter")
        assert second.locator("pre").first.is_visible()
        second.locator("summary").press("Enter")
        assert not second.locator("pre").first.is_visible()


@pytest.mark.browser
def test_dark_mode_follows_the_system_and_the_button(chromium, address):
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(v => v < 60)"
    for scheme, dark in (("dark", True), ("light", False)):
        with opened(chromium, address, color_scheme=scheme) as page:
            page.goto(f"{address}/index.html")
            assert page.evaluate(background) == dark
            page.get_by_label("Color mode").locator("visible=true").click()
            page.get_by_text("Light" if dark else "Dark", exact=True).locator("visible=true").click()
            page.wait_for_function(f"{background} === {str(not dark).lower()}")


VIEWS = [(name, 1280, "light") for name in [*PAGES, "search.html"]]
VIEWS += [(name, width, scheme) for name in PAGES[:2] for width, scheme in ((390, "light"), (1280, "dark"))]


@pytest.mark.browser
@pytest.mark.parametrize(("name", "width", "scheme"), VIEWS)
def test_axe_finds_no_serious_barrier(chromium, address, name, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, address, width, color_scheme=scheme) as page:
        page.goto(f"{address}/{name}", wait_until="networkidle")
        result = Axe().run(page, options={"preload": False})  # else it loads style sheets anew, by wrong addresses
        found = [v for v in result.response["violations"] if v["impact"] in ("serious", "critical")]
        assert len(result.response["passes"]) > 10
        assert found == []
