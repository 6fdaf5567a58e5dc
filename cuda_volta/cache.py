"""A cache of compiled things on disk, safe under concurrent processes, torn files and full disks.

An entry is one file that is written once: the bytes, then their SHA-256. A reader trusts only what the
digest confirms, so a file that was cut short or damaged counts as absent and is built again. A writer
renames a complete temporary file into place, so nobody ever sees half an entry, and a process that has
loaded the previous file keeps it. Where the disk cannot be written, the entry lives in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size


def user_folder() -> Path:
    """The folder of this user's caches: ``fastattn`` below XDG_CACHE_HOME, by default below ~/.cache.

    Raises FileNotFoundError where the user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification asks for relative paths to be ignored.
    if Path(root).is_absolute():
        return Path(root) / "fastattn"
    try:
        return Path("~/.cache/fastattn").expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def digest(*parts: str | bytes) -> str:
    """A key for `Cache`: differs whenever any part does, or where one part ends and the next begins."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


class Cache:
    """Entries of one kind, each under a key that names everything it was built from.

    Args:
        kind: folder of the entries, below ``root``.
        root: None: `user_folder`, looked up at every call.
    """

    def __init__(self, kind: str, root: Path | None = None) -> None:
        self._kind, self._root = kind, root
        self._memory: dict[str, bytes] = {}  # entries that could not be written
        self._files: dict[str, int] = {}  # descriptors of such entries, for `path`

    def fetch(self, key: str, build: Callable[[], bytes]) -> bytes:
        """The entry ``key``; where it is absent or damaged, ``build()`` makes it and it is kept.

        Processes that miss the same key at once build it once: the others wait. What ``build`` raises
        goes to the caller and leaves no entry.
        """
        found = self._read(key)
        if found is not None:
            return found
        with self._locked(key):
            found = self._read(key)
            if found is None:
                found = build()
                self._write(key, found)
        return found

    def path(self, key: str, build: Callable[[], bytes]) -> Path:
        """As `fetch`, for what only a file serves: a path whose bytes begin with the entry.

        The digest follows them, which loaders of shared objects ignore. An entry in memory has a path that
        lasts as long as this process.
        """
        data = self.fetch(key, build)
        if key not in self._memory:
            return self._file(key)
        if key not in self._files:
            self._files[key] = os.memfd_create(key)
            with os.fdopen(os.dup(self._files[key]), "wb") as file:
                file.write(data)
        return Path(f"/proc/{os.getpid()}/fd/{self._files[key]}")

    def _file(self, key: str) -> Path:
        return (user_folder() if self._root is None else self._root) / self._kind / key

    def _read(self, key: str) -> bytes | None:
        if key in self._memory:
            return self._memory[key]
        try:
            stored = self._file(key).read_bytes()
        except OSError:
            return None
        data = stored[:-_DIGEST]
        return data if hashlib.sha256(data).digest() == stored[-_DIGEST:] else None

    def _write(self, key: str, data: bytes) -> None:
        temporary = None
        try:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".new-", delete=False) as new:
                temporary = Path(new.name)
                new.write(data + hashlib.sha256(data).digest())
            temporary.replace(file)
        except OSError:
            self._memory[key] = data
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink()

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Holds the key's lock, which ends with the process; without one where files cannot be locked."""
        lock = None
        with suppress(OSError):
            file = self._file(f".lock-{key}")
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = file.open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()
