"""What contributors are told leads somewhere."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY

GITHUB = REPOSITORY / ".github"
PATH = re.compile(r"`((?:verl|papo|configs|examples|scripts|tests|\.github)(?:/[\w.]+)*|setup\.py)`")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_are_named_exist(name):
    found = PATH.findall((GITHUB / name).read_text())
    assert found and not [path for path in found if not (REPOSITORY / path).exists()]


def test_contributing_is_short():
    assert len((GITHUB / "CONTRIBUTING.md").read_text().splitlines()) < 100


def test_the_changelog_keeps_its_form():
    headings = re.findall(r"^(##+) (.+)$", (GITHUB / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [title for level, title in headings if level == "##"]
    kinds = [title for level, title in headings if level == "###"]
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    assert kinds and set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
