"""The messages in docs/troubleshooting.md exist: each is looked up among the strings of the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \| [^|]+ \| [^|]+ \|$", PAGE, re.M)


def strings(path: Path) -> list[str]:
    """Every string of a file except docstrings, with … in place of inserted values."""
    found, tree = [], ast.parse(path.read_text())
    docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(map(str, parts)))
        elif node not in docs and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


SOURCES = [text for path in (ROOT / "salt_lightning").rglob("*.py") for text in strings(path)]


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_that_the_program_can_say(message):
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.S)
    assert len(message.replace("…", "")) >= 10
    assert [text for text in SOURCES if pattern.search(text)], f"no source says {message!r}"


def test_every_row_of_the_page_has_message_cause_and_remedy():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(MESSAGES) >= 60
    assert len(set(MESSAGES)) == len(MESSAGES)
