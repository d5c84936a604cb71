"""The tables of ``buffer.db`` and how the file is opened.

Called by the ledger. Holds no rules: which row may move where is the ledger's business. ``tally`` is kept by triggers, in the same
transaction as the move it counts, so that a lease in a stage of ten million prompts costs the same as in one of ten.

States of an order: waiting -> leased -> ready -> assigned -> trained, or leased -> refused; leased and (stale) ready rows may return to
waiting. Text longer than 4 KB is a zlib blob, shorter text is plain, so that people can read the file with the sqlite3 shell.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sgpo_dist.errors import EnvironmentProblem, RunFailed

SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_S: Final = 30.0
SYNCHRONOUS: Final = ("OFF", "NORMAL", "FULL")

_BY_DEADLINE: Final = "CREATE INDEX IF NOT EXISTS orders_deadline ON orders (deadline) WHERE state = 'leased'"
"""Each lease and each batch looks for leases that ran out; without this they read every lease there is. A file made before it gets it when opened."""

_TABLES: Final = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value INTEGER NOT NULL
);
INSERT INTO meta VALUES ('incarnation', 0);

CREATE TABLE stages (
    stage TEXT PRIMARY KEY,
    run_seed INTEGER NOT NULL,
    batch_size INTEGER NOT NULL,
    weight_sync_interval INTEGER NOT NULL,
    max_staleness INTEGER,
    max_pairs INTEGER,
    samples_per_prompt INTEGER NOT NULL,
    epochs INTEGER NOT NULL,
    lease_s REAL NOT NULL,
    incarnation INTEGER NOT NULL,
    version INTEGER NOT NULL,
    base_version INTEGER NOT NULL,
    aligned INTEGER NOT NULL DEFAULT 0,
    last_step INTEGER NOT NULL DEFAULT 0,
    committed_step INTEGER NOT NULL DEFAULT 0,
    registered INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE prompts (
    stage TEXT NOT NULL REFERENCES stages,
    prompt_id TEXT NOT NULL,
    messages NOT NULL,
    reference,
    source TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (stage, prompt_id)
);

CREATE TABLE orders (
    uid TEXT NOT NULL UNIQUE,
    stage TEXT NOT NULL REFERENCES stages,
    position INTEGER NOT NULL,
    prompt_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'leased', 'ready', 'assigned', 'trained', 'refused')),
    worker TEXT,
    deadline REAL,
    version INTEGER,
    oldest_grant INTEGER,
    attempts INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    step INTEGER,
    UNIQUE (stage, position),
    FOREIGN KEY (stage, prompt_id) REFERENCES prompts
);
CREATE INDEX orders_waiting ON orders (stage, position) WHERE state = 'waiting';
CREATE INDEX orders_leased ON orders (worker) WHERE state = 'leased';
CREATE INDEX orders_ready ON orders (stage, version, position) WHERE state = 'ready';
CREATE INDEX orders_assigned ON orders (stage, step) WHERE state = 'assigned';

CREATE TABLE pairs (
    uid TEXT PRIMARY KEY REFERENCES orders (uid),
    prompt_ids BLOB NOT NULL,
    response_text NOT NULL, response_ids BLOB NOT NULL, response_finish TEXT NOT NULL, response_version INTEGER NOT NULL,
    refinement_text NOT NULL, refinement_ids BLOB NOT NULL, refinement_finish TEXT NOT NULL, refinement_version INTEGER NOT NULL,
    template TEXT NOT NULL,
    worker TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    digest TEXT NOT NULL
);

CREATE TABLE refusals (
    uid TEXT PRIMARY KEY REFERENCES orders (uid),
    reason TEXT NOT NULL,
    detail NOT NULL,
    response_text, response_ids BLOB, response_finish TEXT, response_version INTEGER,
    refinement_text, refinement_ids BLOB, refinement_finish TEXT, refinement_version INTEGER,
    worker TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    digest TEXT NOT NULL
);

CREATE TABLE journal (
    stage TEXT NOT NULL REFERENCES stages,
    step INTEGER NOT NULL,
    version INTEGER NOT NULL,
    incarnation INTEGER NOT NULL,
    uids TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (stage, step)
);

CREATE TABLE versions (
    seq INTEGER PRIMARY KEY,
    stage TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    version INTEGER NOT NULL,
    event TEXT NOT NULL CHECK (event IN ('open', 'advance')),
    wall_time REAL NOT NULL
);

CREATE TABLE counters (
    stage TEXT NOT NULL,
    name TEXT NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (stage, name)
);

CREATE TABLE tally (
    stage TEXT NOT NULL,
    state TEXT NOT NULL,
    version INTEGER NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (stage, state, version)
);
CREATE TRIGGER orders_registered AFTER INSERT ON orders BEGIN
    INSERT INTO tally VALUES (NEW.stage, NEW.state, 0, 1) ON CONFLICT (stage, state, version) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER orders_moved AFTER UPDATE OF state, version ON orders BEGIN
    UPDATE tally SET n = n - 1
        WHERE stage = OLD.stage AND state = OLD.state
        AND version = CASE WHEN OLD.state IN ('leased', 'ready') THEN OLD.version ELSE 0 END;
    INSERT INTO tally
        VALUES (NEW.stage, NEW.state, CASE WHEN NEW.state IN ('leased', 'ready') THEN NEW.version ELSE 0 END, 1)
        ON CONFLICT (stage, state, version) DO UPDATE SET n = n + 1;
END;
"""


def open_database(path: str, synchronous: str = "FULL") -> sqlite3.Connection:
    """Open (and at first create) the database; ``path`` may be a file, ``:memory:`` or a ``file:`` URI.

    ``synchronous`` FULL makes a commit survive a power cut; OFF is for simulations. The connection belongs to the calling thread.
    """
    if synchronous not in SYNCHRONOUS:
        raise ValueError(f"synchronous must be one of {SYNCHRONOUS}, not {synchronous!r}")
    with mapped_errors(path):
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, uri=path.startswith("file:"))
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = " + synchronous)
            db.execute("PRAGMA foreign_keys = ON")
            _create_or_check(db, path)
            db.execute(_BY_DEADLINE)
        except BaseException:
            db.close()
            raise
    return db


@contextmanager
def mapped_errors(path: str) -> Iterator[None]:
    """Turn the errors of SQLite and of its file into ours: the one door they enter by."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as problem:
        raise EnvironmentProblem(f"{path}: {problem}; check free disk space, write permission, and that nobody else holds it") from problem
    except sqlite3.DatabaseError as problem:
        raise RunFailed(
            f"{path}: {problem}; put the buffer.db of the newest checkpoint in its place, delete buffer.db-wal and buffer.db-shm, and resume"
        ) from problem


def _create_or_check(db: sqlite3.Connection, path: str) -> None:
    """Make the tables in one transaction; of two processes that start at once the second finds them made."""
    if _found_version(db) == 0:
        db.execute("BEGIN IMMEDIATE")
        if _found_version(db) == 0:
            for statement in _statements(_TABLES):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
    found = _found_version(db)
    if found != SCHEMA_VERSION:
        raise RunFailed(f"{path} has schema {found}, this release reads {SCHEMA_VERSION}: use the release that wrote it")


def _found_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one (``executescript`` would end our transaction); a trigger's body stays whole."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
