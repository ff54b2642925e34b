"""The documents tell the truth: snippets run, commands and files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ebbtide.__main__ import VERBS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def snippets(text: str, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of one language, each with the number of its first line."""
    blocks = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


@each_document
def test_python_snippets_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for line, block in snippets(document.read_text(), "python"):
        # The blank lines give a traceback the line numbers of the document.
        exec(compile("\n" * line + block, str(document), "exec"), names)


@each_document
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@each_document
def test_commands_exist(document: Path) -> None:
    text = document.read_text()
    shell = "\n".join(block for _, block in snippets(text, "sh")) + "\n"
    spans = "\n".join(re.findall(r"`([^`\n]+)`", text))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", shell + spans, re.MULTILINE)) <= targets
    assert set(re.findall(r"^ebbtide ([a-z-]+)", shell + spans, re.MULTILINE)) <= set(VERBS)


def test_the_tree_in_contributing_names_every_file() -> None:
    tree = snippets((ROOT / "CONTRIBUTING.md").read_text(), "text")[-1][1]
    named = {
        name.partition("/")[0] for name in re.findall(r"^  (\S+[./]\S*)  ", tree, re.MULTILINE)
    }
    folders = (ROOT / "csrc", ROOT / "src" / "ebbtide")
    files = {path.name for folder in folders for path in folder.iterdir()}
    assert named == files - {"py.typed", "__pycache__"}


def test_every_page_can_be_reached_from_the_first() -> None:
    pages, reached = {ROOT / "docs" / "index.md"}, set[Path]()
    while pages:
        page = pages.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        pages |= {(page.parent / link).resolve() for link in links} - reached
    assert {*(ROOT / "docs").rglob("*.md")} <= reached


def test_the_readme_shows_every_verb_and_both_faces() -> None:
    text = (ROOT / "README.md").read_text()
    assert {*VERBS} == set(re.findall(r"^\| `ebbtide ([a-z-]+)", text, re.MULTILINE))
    code = "".join(block for _, block in snippets(text, "python"))
    assert "from ebbtide.torch import" in code
    assert "from ebbtide.numpy import" in code
