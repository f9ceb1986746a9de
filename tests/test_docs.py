"""What the pages name is there: tests, files, links."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    named = set(re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", page.read_text()))
    missing = [(file, name) for file, name in named if f"def {name}" not in (ROOT / "tests" / file).read_text()]

    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("time_s", "starts"), [(995.0, "True"), (900.0, "False"), (None, "False")])
def test_the_automation_starts_for_a_new_wake_alone_and_for_no_entity_that_goes_offline(time_s, starts):
    """None is the attribute of an entity that is unavailable."""
    jinja2 = pytest.importorskip("jinja2")
    page = (ROOT / "docs" / "home-assistant.md").read_text()
    (template,) = re.findall(r'"(\{\{ now.*?\}\})"', page)
    now = SimpleNamespace(timestamp=lambda: 1000.0)

    assert jinja2.Template(template).render(now=lambda: now, state_attr=lambda entity, name: time_s) == starts
    assert "not_to: [unavailable, unknown]" in page
