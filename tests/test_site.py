"""The web site of the lessons: links are rewritten to what is on it, and a link that leads nowhere is found."""

from pathlib import Path

import pytest

import build_site

ADDRESS = build_site.maintain.settings()["project"]["urls"]["Repository"]


@pytest.mark.parametrize(
    ("page", "link", "wanted"),
    [
        ("notebooks/08_tdm.ipynb", "07_idm.ipynb", "07_idm.html"),
        ("notebooks/08_tdm.ipynb", "GLOSSARY.md#words", "GLOSSARY.html#words"),
        ("notebooks/08_tdm.ipynb", "../README.md", "../index.html"),
        ("README.md", "notebooks/GLOSSARY.md", "notebooks/GLOSSARY.md"),
        ("README.zh.md", "README.md", "index.md"),
        ("README.md", "LICENSE", f"{ADDRESS}/blob/main/LICENSE"),
        ("README.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("README.md", "no/such/file.md", "no/such/file.md"),
    ],
)
def test_links_lead_to_pages_of_the_site_or_to_the_project(page: str, link: str, wanted: str) -> None:
    assert build_site.relinked(f"see [this]({link}).", Path(page)) == f"see [this]({wanted})."


def test_every_lesson_and_task_is_a_page(tmp_path: Path) -> None:
    chapters = {title: pages for chapter in build_site.lay_out(tmp_path)["nav"] for title, pages in chapter.items()}
    lessons = build_site.maintain.lessons()
    assert [Path(*page.values()).stem for page in chapters["Lessons"]] == lessons
    tasks = [file.stem for file in sorted((build_site.ROOT / "exercises").glob("*.ipynb"))]
    assert [Path(*page.values()).stem for page in chapters["Tasks"]] == [name for name in lessons if name in tasks]
    assert len(tasks) == len(lessons) - 1
    assert all((tmp_path / page).is_file() for pages in chapters.values() for entry in pages for page in entry.values())


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1> <a href="b.html#here">b</a> <a href="b.html#there">b</a> <a href="#top">a</a>'
        '<img src="lost.png"> <a href="https://example.org/lost">out</a> <code><a href="in_code.html"></code>'
    )
    (tmp_path / "b.html").write_text('<h1 id="here">B</h1>')
    found = list(build_site.broken_links(tmp_path))
    assert sorted(found) == ["a.html: b.html#there names no heading", "a.html: lost.png leads nowhere"]
