"""The database that studies are kept in, any of SQLAlchemy's: opened by many processes, and waited for when it goes away."""

import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy import event, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from sodaops.errors import ConfigError, StorageError

T = TypeVar("T")
BROKEN = (optuna.exceptions.StorageInternalError, SQLAlchemyError)  # what a database that went away raises
_TRIES_S = (0.2, 0.5, 1.0, 2.0, 4.0)  # waits after processes met in an empty database, or a database that was busy
_POLL_S = 1.0
_LOCK = 0x50DA0  # the number of our advisory lock, one in each database
# Seconds and milliseconds after which libpq's drivers take a silent machine for gone; without them they wait for hours.
_GONE = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_PASSING = "starting up|shutting down|recovery|terminating|too many|connection slots"
_FOR_GOOD = re.compile(rf"no password supplied|FATAL(?!.*({_PASSING}))")


def check_url(url: str) -> None:
    """Refuses a database that cannot be named in a file that others read.

    Raises:
        ConfigError: no URL, an unknown database, one in memory, or a password in it.
    """
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError, ModuleNotFoundError) as error:
        what = str(error).partition(" from given URL string")[0]
        raise ConfigError(
            f"search.storage={masked(url)!r}: {what}; expected postgresql+psycopg://USER@HOST/DATABASE."
        ) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"search.storage={url}: the memory of one process; its jobs need a file, sqlite:///FILE.")
    if parsed.password is not None or any("pass" in key.lower() for key in parsed.query):
        raise ConfigError(
            f"search.storage={masked(url)}: a password has no place in a key; give it in PGPASSWORD or ~/.pgpass."
        )


def masked(url: str) -> str:
    """A database's URL as it may be shown, with stars for what may be a secret.

    >>> masked("postgresql://me:secret@host/db?password=secret&sslmode=require")
    'postgresql://me:***@host/db?password=***&sslmode=require'
    """
    return re.sub(r"(?i)(pass\w*=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*:).*@", r"\1***@", url))


def said(error: BaseException) -> str:
    """The first line of what the driver said."""
    cause = error.__cause__ or error
    return (str(getattr(cause, "orig", None) or cause) or type(cause).__name__).splitlines()[0]


def open_storage(url: str, grace_s: int = 60, wait_s: float = 0.0) -> RDBStorage:
    """Opens the database, and makes its tables where it has none.

    Args:
        url: SQLAlchemy's.
        grace_s: seconds without a heartbeat after which a trial counts as lost.
        wait_s: how long a database that does not answer is waited for, beyond a few short tries.

    Raises:
        ConfigError: as :func:`check_url` says, or no driver.
        StorageError: no connection, or no database of Optuna's.
    """
    check_url(url)
    waits_s, until_s = iter(_TRIES_S), time.monotonic() + wait_s
    while True:
        try:
            return _opened(url, grace_s)
        except ImportError as error:
            cause = error.__cause__ or error
            missing = f"{name} is not installed" if (name := getattr(cause, "name", None)) else str(cause).splitlines()[0]
            raise ConfigError(
                f"search.storage={masked(url)}: {missing}; get PostgreSQL's driver with `pip install 'sodaops[postgres]'`, "
                "and write postgresql+psycopg://…."
            ) from None
        except (*BROKEN, RuntimeError) as error:
            next_s = next(waits_s, _POLL_S if time.monotonic() < until_s else None)
            if next_s is None or _FOR_GOOD.search(said(error)):
                mend = "Check the address, the password (PGPASSWORD or ~/.pgpass) and that the database runs."
                raise StorageError(f"search.storage={masked(url)}: {said(error)}. {mend}") from error
            time.sleep(next_s * random.uniform(0.5, 1.5))  # those who met are not to meet again


def _opened(url: str, grace_s: int) -> RDBStorage:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:  # trials last minutes, and hundreds of them are not to hold a connection each
        known = _GONE if parsed.get_driver_name() in ("psycopg", "psycopg2") else {}
        given = {key: value for key, value in known.items() if key not in parsed.query}
        options = {"poolclass": NullPool, "connect_args": given}
    kept = RDBStorage(url, engine_kwargs=options, heartbeat_interval=max(1, grace_s // 4), grace_period=grace_s)
    if parsed.get_backend_name() == "postgresql":
        event.listen(kept.engine, "connect", _in_utc)
    return kept


def _in_utc(connection: Any, record: Any) -> None:
    """Optuna keeps heartbeats in the time zone of their writer's session, and compares them in that of their reader's."""
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
    connection.commit()


@contextlib.contextmanager
def alone(engine: Engine) -> Iterator[None]:
    """One process at a time, of all that use a PostgreSQL or SQLite database; of others nothing is promised.

    A study is begun, and its trials are counted, by looking first and writing then.
    """
    if engine.dialect.name == "sqlite":
        path = Path(engine.url.database)
        with FileLock(path.parent / f".{path.name}.lock"):
            yield
    elif engine.dialect.name == "postgresql":
        with engine.begin() as connection:  # the lock ends with the transaction, or with the process
            connection.execute(text("SET LOCAL lock_timeout = '5min'"))
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '2min'"))  # or with a silent machine
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
            yield
    else:
        yield


def engine_of(study: optuna.Study) -> Engine:
    """What a study's database is reached by."""
    return study._storage._backend.engine


class Patience:
    """Waits for a database that is away, whenever the thread that made this needs a connection.

    Args:
        engine: of the database.
        url: its own, for messages.
        longest_s: how long it may be away for; other threads do not wait, but their time counts.

    Attributes:
        since_s: when the database was found, or found again, on the clock of ``time.monotonic``.
    """

    def __init__(self, engine: Engine, url: str, longest_s: float) -> None:
        self._name, self._longest_s, self._thread = masked(url), longest_s, threading.get_ident()
        self._gone_at_s: float | None = None
        self.since_s = time.monotonic()
        if engine.dialect.name != "sqlite":  # a file is there or is not
            event.listen(engine, "do_connect", self._connect)

    def end(self) -> None:
        """From now on nobody waits."""
        self._longest_s = 0.0

    def _connect(self, dialect: Any, record: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        while True:
            try:
                connection = dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.Error as error:
                gone_at_s, now_s = self._gone_at_s, time.monotonic()
                if gone_at_s is None:
                    self._gone_at_s = gone_at_s = now_s
                    print(f"search.storage={self._name}: {said(error)}; waiting up to {self._longest_s:.0f} s", flush=True)
                if now_s - gone_at_s >= self._longest_s or threading.get_ident() != self._thread:
                    raise
                time.sleep(_POLL_S)
            else:
                if self._gone_at_s is not None:
                    self._gone_at_s, self.since_s = None, time.monotonic()
                    print(f"search.storage={self._name}: it answers again", flush=True)
                return connection


def again(action: Callable[[], T]) -> T:
    """Does something with the database, once more where the connection broke in the middle of it."""
    try:
        return action()
    except BROKEN:
        return action()


@contextlib.contextmanager
def answering(url: str) -> Iterator[None]:
    """Tells of a database that went away for good as of an error with a mend.

    Raises:
        StorageError: it went away.
    """
    try:
        yield
    except BROKEN as error:
        raise StorageError(
            f"search.storage={masked(url)}: {said(error)}. The same command goes on once the database answers."
        ) from error
