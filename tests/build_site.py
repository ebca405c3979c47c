"""The lessons as a web site that needs no kernel.

    python tests/build_site.py [--output out/site]

Lays README, lessons, tasks, glossary and the teachers' page out as mkdocs wants them, with the outputs that are stored
in the notebooks (nothing is executed), builds the pages, and follows every link of every page to a file, and to a
heading where it names one. Exit status 1 where one leads nowhere. Needs the extra "site".
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

import maintain

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md", "README.zh.md", "notebooks/GLOSSARY.md", "notebooks/TEACHING.md", "data/weights/classroom/README.md",
]  # fmt: skip
PICTURES = ["data/samples", "data/weights/classroom"]  # folders of what the pages show
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
ATTRIBUTE = re.compile(r"""\s(?:href|src)=(?:"([^"]*)"|'([^']*)')""")
CODE = re.compile(r"<(script|pre|code)\b.*?</\1>", re.DOTALL)
TARGET = re.compile(r"""\s(?:id|name)=["']([^"']+)["']""")
CONFIG = {
    "site_name": "DiffTSR, lesson by lesson",
    "use_directory_urls": False,  # pages open from a folder, without a server
    "theme": {
        "name": "material",
        "font": False,  # nothing is fetched from elsewhere
        "features": ["navigation.tabs", "navigation.footer", "toc.follow"],
    },
    "plugins": ["search", {"mkdocs-jupyter": {"execute": False, "include_source": False, "show_input": True}}],
    "markdown_extensions": ["tables", "admonition", "md_in_html", {"toc": {"permalink": True}}],
    "validation": {"nav": {"omitted_files": "ignore"}},
}


def title(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.split("\n", 1)[0].lstrip("# ")


def relinked(text: str, page: Path) -> str:
    """The text of a page whose links to files that are not on the site lead to the project's address."""
    address = maintain.settings()["project"]["urls"]["Repository"].rstrip("/")

    def replaced(match: re.Match) -> str:
        path = match[2].split("#")[0]
        if not path or urlsplit(path).scheme:
            return match[0]
        target = (ROOT / page.parent / unquote(path)).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[0]  # found broken by the check
        place = target.relative_to(ROOT)
        if place.as_posix() not in PAGES and target.suffix not in (".ipynb", ".webp"):
            return f"{match[1]}{address}/blob/main/{place.as_posix()}{match[3]}"
        link = match[2]
        if place == Path("README.md"):
            link = link.replace("README.md", "index.md")
        if page.suffix == ".ipynb":  # in its own pages mkdocs does it
            link = re.sub(r"\.(md|ipynb)(?=$|#)", ".html", link)
        return f"{match[1]}{link}{match[3]}"

    return LINK.sub(replaced, text)


def lay_out(docs: Path) -> dict:
    """Copy the pages below `docs`, and return the settings of mkdocs."""
    lessons, tasks = [], []
    for name in PAGES:
        path = docs / ("index.md" if name == "README.md" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(relinked((ROOT / name).read_text(encoding="utf-8"), Path(name)), encoding="utf-8")
    for folder, chapter in ((maintain.LESSONS, lessons), (maintain.EXERCISES, tasks)):
        for path in sorted(folder.glob("[0-9]*.ipynb")):
            notebook, place = maintain.read_notebook(path), path.relative_to(ROOT)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = relinked(cell.source, place)
            (docs / place).parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, docs / place)
            chapter.append({title(notebook): place.as_posix()})
    for folder in PICTURES:
        (docs / folder).mkdir(parents=True, exist_ok=True)
        for picture in (ROOT / folder).glob("*.webp"):
            shutil.copy(picture, docs / folder)
    course = [{"Glossary": "notebooks/GLOSSARY.md"}, {"For teachers": "notebooks/TEACHING.md"}]
    start = [{"Start": "index.md"}, {"中文": "README.zh.md"}, {"Model card": "data/weights/classroom/README.md"}]
    return CONFIG | {"nav": [{"Project": start}, {"Lessons": lessons}, {"Tasks": tasks}, {"Course": course}]}


def broken_links(site: Path) -> Iterator[str]:
    """Every link of the site that leads to no file, or to no place in it."""
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    places = {path: {html.unescape(name) for name in TARGET.findall(text)} for path, text in texts.items()}
    for path, text in texts.items():
        if path.name == "404.html":  # its links are for the root of a server
            continue
        for link in {html.unescape(double or single) for double, single in ATTRIBUTE.findall(CODE.sub("", text))}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{path.relative_to(site)}: {link} leads nowhere"
            elif parts.fragment and unquote(parts.fragment) not in places.get(target, parts.fragment):
                yield f"{path.relative_to(site)}: {link} names no heading"


def build(output: Path) -> list[str]:
    """Build the site into `output`, in place of what was there, and return its broken links.

    Raises `RuntimeError` with the words of mkdocs when it builds none.
    """
    with tempfile.TemporaryDirectory() as folder:
        docs, config = Path(folder, "docs"), Path(folder, "mkdocs.yml")
        docs.mkdir()
        config.write_text(yaml.safe_dump(lay_out(docs), allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(config), "--site-dir"]
        done = subprocess.run([*command, f"{folder}/site"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"mkdocs: {(done.stderr + done.stdout)[-2000:]}")
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(f"{folder}/site", output)
    return list(broken_links(output))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=ROOT / "out" / "site")
    output = options.parse_args().output
    problems = build(output)
    print(*problems, f"{sum(1 for _ in output.rglob('*.html'))} pages, {len(problems)} broken links", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
