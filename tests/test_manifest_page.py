"""docs/manifest.md says what the code declares, and every question on it can be asked."""

from pathlib import Path

from jobs.docs import answers, ask, manifest_tables
from schemas.tables import TABLE_DOCS, TABLES, column_doc
from tests.corpora import make_corpus


def test_the_page_describes_every_column() -> None:
    assert TABLE_DOCS.keys() == TABLES.keys()
    page = manifest_tables()
    for schema in TABLES.values():
        for field in schema:
            assert f"| `{field.name}` |" in page
            assert column_doc(field)


def test_every_question_is_answered(tmp_path: Path) -> None:
    comes = ask(make_corpus(str(tmp_path / "corpus")).root)
    assert len(comes) == 11 and comes.keys() == answers().keys()
    empty = {question for question, answer in comes.items() if answer == "none"}
    assert empty == {"What failed every attempt?"}
