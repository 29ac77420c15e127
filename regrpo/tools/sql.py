"""`sql`: one read-only query on a SQLite file of the workspace."""

from __future__ import annotations

import os
import sqlite3
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.parameters import PathText, Statement
from regrpo.tools.paths import open_inside, path_failure

MAX_ROWS = 1000
# About 0.2 s of SQLite's virtual machine. Unlike a clock, it stops the same query every time.
MAX_STEPS = 10_000_000

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer"}  # code, and addresses of code
_SCHEMA = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"


def sql(root: Path, database: PathText, query: Statement) -> Observation:
    """Run one SELECT on a SQLite file; rows come one a line, columns joined by ", ".

    An OperationalError also shows the statements that made the database, as they are stored.
    """
    try:
        os.close(open_inside(root, database))
    except (OSError, ValueError) as error:
        return path_failure(root, database, error)
    # immutable: no lock files, no journal; the workspace does not change while it is used.
    uri = f"file:{quote(str(root / database))}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA temp_store=memory")
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: 1, MAX_STEPS)
        try:
            rows = list(islice(connection.execute(query), MAX_ROWS))
        except sqlite3.OperationalError as error:
            return failure(error, _schema(connection))
        # 3.10 raises Warning for a second statement; ValueError is for NULs and lone surrogates.
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return failure(error)
    finally:
        connection.close()
    if not rows:
        return Observation("(no rows)", Status.EMPTY)
    return Observation("\n".join(", ".join(map(_text, row)) for row in rows), Status.OK)


def _schema(connection: sqlite3.Connection) -> str:
    try:
        return "\n".join(statement for (statement,) in connection.execute(_SCHEMA))
    except sqlite3.DatabaseError:  # unreadable as well; the first error says why
        return ""


def _authorize(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _text(value: object) -> str:
    if value is None:
        return "NULL"
    return value.hex() if isinstance(value, bytes) else str(value)
