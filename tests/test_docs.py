"""Docs and the tree: what one names, the other has."""

from __future__ import annotations

import re
from pathlib import Path

import semipd
import semipd.errors

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
USERS_FILES = {"config.json", "results.json"}


def named_files(paths: list[Path]) -> set[str]:
    """The names of JSON files in the texts."""
    return {name for path in paths for name in re.findall(r"[\w-]+\.json\b", path.read_text())}


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = set(re.findall(r"^::: semipd\.(\w+)$", text, re.MULTILINE)) | {"__version__"}
    errors = set(vars(semipd.errors)) if "errors" in listed else set()
    assert set(semipd.__all__) - errors == listed - {"errors"} and "`__version__`" in text


def test_every_result_is_named_in_a_doc_or_a_benchmark() -> None:
    named = named_files([*DOCS, *(ROOT / "benchmarks").glob("*.py")])
    assert not sorted(RESULTS - named), "say in docs what they show and how to get them again, or delete them"


def test_every_result_that_docs_name_is_there() -> None:
    assert not sorted(named_files(DOCS) - USERS_FILES - RESULTS)


def test_every_module_of_the_engine_has_its_room() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("\n## The way of a request")[0]
    rooms = set(re.findall(r"`([\w/.]+)`", table))
    package = ROOT / "semipd"
    modules = [*package.glob("*.py"), *(package / "sched").glob("*.py"), *package.glob("*/__init__.py")]
    names = {str(path.relative_to(package)).replace("__init__.py", "") for path in modules}
    assert not sorted(names - rooms - {"", "sched/"})
