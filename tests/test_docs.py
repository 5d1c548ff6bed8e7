# SPDX-License-Identifier: Apache-2.0
"""What the documentation says of settings, and what it links to, is there."""

import ast
import os
import pathlib
import re
import xml.etree.ElementTree

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURES = sorted((ROOT / "docs").glob("*.svg"))
LINK = re.compile(r"\]\(([^()\s]+)\)")
SVG = "{http://www.w3.org/2000/svg}"


def macros_of_compress():
    """Macro -> its default in compress.gin; "required" where it must be set."""
    text = (ROOT / "t5x_configs/runs/compress.gin").read_text()
    found = dict(re.findall(r"^([A-Z_]+) = (.+)$", text, re.MULTILINE))
    return {name: "required" if "REQUIRED" in value else value for name, value in found.items()}


def anchors(page):
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_compress_names_every_setting_with_its_default():
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (\S[^|]*?) \|", (ROOT / "docs/compress.md").read_text(), re.MULTILINE
    )
    said = {name: default.strip("`") for name, default in rows}
    assert len(said) == len(rows)  # none twice
    expected = macros_of_compress()
    assert len(expected) > 20
    assert said.keys() == expected.keys()
    for name, default in expected.items():
        if default == "required":
            assert said[name] == default
        else:
            assert ast.literal_eval(said[name]) == ast.literal_eval(default), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_figures_are_whole_and_shown(figure):
    root = xml.etree.ElementTree.parse(figure).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox")
    assert root.find(f"{SVG}title") is not None
    for mark in re.findall(r"url\(#(\w+)\)", figure.read_text()):
        assert any(element.get("id") == mark for element in root.iter())
    assert any(f"]({os.path.relpath(figure, page.parent)})" in page.read_text() for page in PAGES)


def test_the_examples_in_python_run(tmp_path, monkeypatch, capsys):
    """Those of README.md, which make the packed checkpoint, and of the page that runs it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = [
        block
        for page in (ROOT / "README.md", ROOT / "docs/inference.md")
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        )
    ]
    assert len(blocks) > 2
    known: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "example", "exec"), known)
    assert "<extra_id_0>" in capsys.readouterr().out


def test_there_is_something_to_check():
    assert {"README.md", "compress.md"} <= {page.name for page in PAGES}
    assert {"architecture.svg", "compress.svg"} <= {figure.name for figure in FIGURES}
