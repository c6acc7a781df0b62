"""The pages of docs/: they build without a warning, their links lead somewhere, and what is generated is current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmshrink
from llmshrink.recipe.read import shipped_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^()\s]+)\)")
OUTSIDE = re.compile(r"[a-z]+:")


def test_the_recipes_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "reference.py"), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_table_has_every_shipped_recipe() -> None:
    table = (ROOT / "README.md").read_text().partition("\n### Recipes\n")[2].partition("\n### ")[0]
    named = {name for row in table.splitlines() if row.startswith("| `") for name in re.findall("`([^`]+)`", row)}
    assert set(shipped_names()) <= named


def test_the_site_builds_and_every_link_and_anchor_in_it_leads_somewhere(tmp_path: Path) -> None:
    """Sphinx warns of a link or an anchor without a target and of a page that no list has; a warning is an error."""
    pytest.importorskip("sphinx")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in (tmp_path / "site").glob("*.html")}


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a Markdown file, as code hosts make it of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readmes_links_lead_somewhere() -> None:
    readme = ROOT / "README.md"
    links = [link for link in LINK.findall(readme.read_text(encoding="utf-8")) if not OUTSIDE.match(link)]
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else readme
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_verb_of_the_api_is_on_its_page() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    verbs = set(llmshrink.__all__) - {"LlmshrinkError", "__version__"}
    assert verbs == set(re.findall(r"autofunction:: llmshrink\.(\w+)", page))
