"""SQLite files that survive a killed process or a machine without power, and are shared by several processes."""

import contextlib
import sqlite3
import time
from pathlib import Path

from tsalign_jax.types import UserError

VERSION = 1
PATIENCE = 60.0  # seconds to wait for another process


def open_database(file: Path, schema: str) -> sqlite3.Connection:
  """A connection to the file, made with this schema if it is new. Raises UserError if it is something else.

  Every statement commits by itself, and is on the disk by then. In write-ahead mode readers do not wait for a writer.
  """
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    # The connection is made by one thread and used by another, never by two at once.
    connection = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = FULL")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found not in (0, VERSION):
      raise UserError(f"{file}: written by another version of tsalign_jax; choose another file")
    connection.executescript(f"{schema}; PRAGMA user_version = {VERSION};")
  except (OSError, sqlite3.DatabaseError) as error:
    raise UserError(f"{file}: cannot be used as an SQLite file ({error})") from error
  return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
  """Switches to write-ahead mode. SQLite does not wait for whoever else opens a new file at this moment, so we do."""
  patience = time.monotonic() + PATIENCE
  while True:
    try:
      connection.execute("PRAGMA journal_mode = WAL")
      return
    except sqlite3.OperationalError as error:
      primary = error.sqlite_errorcode & 0xFF  # without what SQLite adds to say why
      if primary != sqlite3.SQLITE_BUSY or time.monotonic() > patience:
        raise
    time.sleep(0.01)


def read_database(file: Path, table: str, query: str) -> list[tuple]:
  """What a query of this table gives, without writing; nothing where there is no file yet, or no such table in it.

  Raises UserError if the file cannot be read.
  """
  if not file.is_file():
    return []
  uri = f"{file.resolve().as_uri()}?mode=ro"
  try:
    with contextlib.closing(sqlite3.connect(uri, timeout=PATIENCE, uri=True)) as opened:
      known = opened.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
      return opened.execute(query).fetchall() if known else []
  except sqlite3.DatabaseError as error:
    raise UserError(f"{file}: cannot be read as an SQLite file ({error})") from error
