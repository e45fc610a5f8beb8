"""Build the course as a web site: `python docs/build.py` writes it to the folder _site. It runs no notebook.

The front page is README.md, and every notebook is a page with its stored outputs. Sphinx wants its sources in one
folder, so they are copied to a temporary one; conf.py, beside this file, says how they are shown.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]


def copy_sources(folder: Path) -> None:
    """Copy what the site shows: the README as index.md with a table of contents, the notebooks, what the README links.

    Raises:
        ValueError: the README's table does not name each notebook once, in order. The menu takes its labels from there.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) \| \[(.+?)\]\((notebooks/\w+)\.ipynb\)", readme, flags=re.M)
    notebooks = [f"notebooks/{path.stem}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    if [page for _, _, page in rows] != notebooks:
        raise ValueError("README.md: the table of notebooks does not name each file of notebooks/ once, in order")
    entries = "\n".join(f"{number} {label} <{page}>" for number, label, page in rows)
    contents = f"\n```{{toctree}}\n:hidden:\n:caption: Notebooks\n\n{entries}\n```\n"
    folder.mkdir()
    (folder / "index.md").write_text(readme + contents, encoding="utf-8")
    for name in set(re.findall(r"\]\((?!\w+:|#)([^)#]+)", readme)):
        if (ROOT / name).is_file():  # Sphinx warns about a link to what is not there
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def build(target: Path) -> None:
    """Build the site in a temporary folder, and put it at `target` when it is whole; an earlier site there is replaced.

    Raises:
        FileExistsError: `target` is there and is not a site.
        RuntimeError: Sphinx found something to warn about, and has printed it.
    """
    if target.exists() and not (target / "objects.inv").exists():
        raise FileExistsError(f"{target} exists and is not a site built by this command; choose another folder")
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name, "source"), Path(name, "site")
        copy_sources(source)
        options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(Path(name, "doctrees"))]
        if build_main([*options, str(source), str(output)]):
            raise RuntimeError("the site was not built: mend what Sphinx names above")
        if target.exists():
            shutil.rmtree(target)
        shutil.move(output, target)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_site"
    build(folder)
    print(f"The site is in {folder}. Open {folder / 'index.html'} in a browser.")
