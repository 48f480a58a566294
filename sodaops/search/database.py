"""Access to the database of a study: opening it from many processes, locking it, and waiting while it is away."""

import contextlib
import logging
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

log = logging.getLogger(__name__)
T = TypeVar("T")
DATABASE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)  # raised when the connection is lost
_RETRY_DELAYS_S = (0.2, 0.5, 1.0, 2.0, 4.0)  # for a busy database, or one whose tables another process is creating
_POLL_S = 1.0
_LOCK_ID = 0x50DA0  # of our PostgreSQL advisory lock
# Without these options a PostgreSQL client waits for hours for a server that no longer answers.
_TIMEOUTS = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # ms
}
_TEMPORARY = "starting up|shutting down|recovery|terminating|too many|connection slots"
_PERMANENT_ERROR = re.compile(rf"no password supplied|FATAL(?!.*({_TEMPORARY}))")


def check_storage_url(url: str) -> None:
    """Checks that a database URL can be used by several processes and written to files.

    Raises:
        ConfigError: not a URL, an unknown or in-memory database, or a password in it.
    """
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError, ModuleNotFoundError) as error:
        reason = str(error).partition(" from given URL string")[0]
        raise ConfigError(
            f"search.storage={mask_password(url)!r}: {reason}; expected postgresql+psycopg://USER@HOST/DATABASE."
        ) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"search.storage={url}: an in-memory database cannot be shared by processes; use sqlite:///FILE.")
    if parsed.password is not None or any("pass" in key.lower() for key in parsed.query):
        raise ConfigError(
            f"search.storage={mask_password(url)}: the URL must not contain a password; set PGPASSWORD or use ~/.pgpass."
        )


def mask_password(url: str) -> str:
    """A database URL with its passwords replaced by ``***``, for messages.

    >>> mask_password("postgresql://me:secret@host/db?password=secret&sslmode=require")
    'postgresql://me:***@host/db?password=***&sslmode=require'
    """
    return re.sub(r"(?i)(pass\w*=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*:).*@", r"\1***@", url))


def driver_message(error: BaseException) -> str:
    """The first line of the database driver's own message."""
    cause = error.__cause__ or error
    return (str(getattr(cause, "orig", None) or cause) or type(cause).__name__).splitlines()[0]


def open_storage(url: str, grace_s: int = 60, wait_s: float = 0.0) -> RDBStorage:
    """Opens the database, and creates Optuna's tables if it has none.

    Args:
        url: SQLAlchemy URL.
        grace_s: seconds without a heartbeat after which a trial counts as lost.
        wait_s: how long to keep trying after the first few attempts failed.

    Raises:
        ConfigError: see :func:`check_storage_url`; or the driver is not installed.
        StorageError: no connection, or the database is not Optuna's.
    """
    check_storage_url(url)
    delays_s, deadline_s = iter(_RETRY_DELAYS_S), time.monotonic() + wait_s
    while True:
        try:
            return _create_storage(url, grace_s)
        except ImportError as error:
            cause = error.__cause__ or error
            reason = f"{name} is not installed" if (name := getattr(cause, "name", None)) else str(cause).splitlines()[0]
            raise ConfigError(
                f"search.storage={mask_password(url)}: {reason}; install the PostgreSQL driver with "
                "`pip install 'sodaops[postgres]'` and use postgresql+psycopg://USER@HOST/DATABASE."
            ) from None
        except (*DATABASE_ERRORS, RuntimeError) as error:
            delay_s = next(delays_s, _POLL_S if time.monotonic() < deadline_s else None)
            if delay_s is None or _PERMANENT_ERROR.search(driver_message(error)):
                raise StorageError(
                    f"search.storage={mask_password(url)}: {driver_message(error)}. Check the address, the password "
                    "(PGPASSWORD or ~/.pgpass) and that the database is running."
                ) from error
            time.sleep(delay_s * random.uniform(0.5, 1.5))  # random, so that processes do not collide again


def _create_storage(url: str, grace_s: int) -> RDBStorage:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:  # no pool: hundreds of long-running trials must not hold a connection each
        defaults = _TIMEOUTS if parsed.get_driver_name() in ("psycopg", "psycopg2") else {}
        arguments = {key: value for key, value in defaults.items() if key not in parsed.query}
        options = {"poolclass": NullPool, "connect_args": arguments}
    storage = RDBStorage(url, engine_kwargs=options, heartbeat_interval=max(1, grace_s // 4), grace_period=grace_s)
    if parsed.get_backend_name() == "postgresql":
        event.listen(storage.engine, "connect", _use_utc)
    return storage


def _use_utc(connection: Any, record: Any) -> None:
    """Sets the session's time zone: Optuna writes heartbeats in the writer's zone and reads them in the reader's."""
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
    connection.commit()


@contextlib.contextmanager
def database_lock(engine: Engine) -> Iterator[None]:
    """Lets one process at a time run the block, for sequences of reads and writes. Only PostgreSQL and SQLite are locked."""
    if engine.dialect.name == "sqlite":
        path = Path(engine.url.database)
        with FileLock(path.parent / f".{path.name}.lock"):
            yield
    elif engine.dialect.name == "postgresql":
        with engine.begin() as connection:  # the lock is released with the transaction, or when the process dies
            connection.execute(text("SET LOCAL lock_timeout = '5min'"))
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '2min'"))  # or when its machine dies
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK_ID})
            yield
    else:
        yield


def engine_of(study: optuna.Study) -> Engine:
    """The SQLAlchemy engine of a study's storage."""
    return study._storage._backend.engine


class Reconnector:
    """Makes the creating thread wait for a database that is away, whenever it opens a connection.

    Args:
        engine: of the database.
        url: its URL, for messages.
        max_wait_s: how long the database may be away. Other threads fail at once, but their failures start the clock.

    Attributes:
        connected_since_s: when the database was first reached, or reached again (``time.monotonic``).
    """

    def __init__(self, engine: Engine, url: str, max_wait_s: float) -> None:
        self._name, self._max_wait_s, self._thread = mask_password(url), max_wait_s, threading.get_ident()
        self._lost_at_s: float | None = None
        self.connected_since_s = time.monotonic()
        if engine.dialect.name != "sqlite":  # a local file does not come back by waiting
            event.listen(engine, "do_connect", self._connect)

    def stop_waiting(self) -> None:
        """Makes every later attempt fail at once."""
        self._max_wait_s = 0.0

    def _connect(self, dialect: Any, record: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        while True:
            try:
                connection = dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.Error as error:
                lost_at_s, now_s = self._lost_at_s, time.monotonic()
                if lost_at_s is None:
                    self._lost_at_s = lost_at_s = now_s
                    log.warning(
                        "search.storage=%s: %s; waiting up to %.0f s", self._name, driver_message(error), self._max_wait_s
                    )
                if now_s - lost_at_s >= self._max_wait_s or threading.get_ident() != self._thread:
                    raise
                time.sleep(_POLL_S)
            else:
                if self._lost_at_s is not None:
                    self._lost_at_s, self.connected_since_s = None, time.monotonic()
                    log.info("search.storage=%s: connected again", self._name)
                return connection


def retry_once(action: Callable[[], T]) -> T:
    """Calls ``action``, and calls it again if the connection broke meanwhile."""
    try:
        return action()
    except DATABASE_ERRORS:
        return action()


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns errors of the database into a StorageError that says how to continue.

    Raises:
        StorageError: the connection was lost.
    """
    try:
        yield
    except DATABASE_ERRORS as error:
        raise StorageError(
            f"search.storage={mask_password(url)}: {driver_message(error)}. "
            "Run the same command again when the database is back; it resumes the study."
        ) from error
