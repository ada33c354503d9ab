"""Files that survive a killed process and a power failure, and one writer per dataset.

A writer keeps its lock and its unfinished files in the folder ``.robopolicy`` of the dataset and removes the folder
when it closes. So a folder that is still there marks a writer that is running (it holds the lock) or was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from robopolicy.errors import UserError

WRITER_FOLDER = ".robopolicy"
_SYNC_THREADS = 8


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DurableStore(LocalStore):
    """A zarr store in which no file is ever seen half-written and :meth:`flush` puts all of them on the disk.

    A file that exists is replaced atomically, its new content on the disk before it takes the name. A new file may
    reach the disk as late as :meth:`flush`, where many are synchronised together.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._temporary = self.root / WRITER_FOLDER
        self._numbers = itertools.count()
        self._unsynced_files: set[Path] = set()
        self._unsynced_folders: set[Path] = set()

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not (self.root / key).exists():
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        self.write(key, value.as_buffer_like())

    def write(self, key: str, content: bytes | bytearray | memoryview) -> None:
        """Write one file whole; readers see the old content or the new one."""
        path = self.root / key
        temporary = self._temporary / f"{next(self._numbers)}.partial"
        replaces = path.exists()
        if not replaces:
            self._make_folder(path.parent)
        with temporary.open("wb") as file:
            file.write(content)
            if replaces:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if not replaces:
            self._unsynced_files.add(path)
        self._unsynced_folders.add(path.parent)

    def flush(self) -> None:
        """Return when everything written so far is on the disk.

        New names must not be on the disk before their content, so the folders come after the files.
        """
        files, self._unsynced_files = self._unsynced_files, set()
        folders, self._unsynced_folders = self._unsynced_folders, set()
        _sync_all(files)
        _sync_all(folders)

    def finish(self) -> None:
        """Flush and remove the folder for unfinished files."""
        self.flush()
        self._temporary.rmdir()

    def _make_folder(self, folder: Path) -> None:
        self._temporary.mkdir(exist_ok=True)
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            self._unsynced_folders.add(new.parent)


def _sync_all(paths: Iterable[Path]) -> None:
    paths = list(paths)
    if len(paths) < _SYNC_THREADS:
        for path in paths:
            sync_path(path)
        return
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(sync_path, paths))


def check_free(path: Path) -> None:
    """Refuse to write over something.

    Raises:
        UserError: ``path`` exists and is no empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: already exists. Choose another name, or remove it first.")


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to build a file or folder under; it becomes ``path`` if the block succeeds.

    Raises:
        UserError: ``path`` exists and is no empty folder.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished") as folder:
        unfinished = Path(folder, path.name)
        yield unfinished
        os.rename(unfinished, path)
        sync_path(path.parent)


class WriterLock:
    """The exclusive right to write one dataset.

    Attributes:
        was_killed: the previous writer ended without closing the dataset; unfinished files may be around.
    """

    def __init__(self, dataset: Path) -> None:
        """Take the lock.

        Raises:
            UserError: another process writes this dataset, or the folder is not writable.
        """
        self._folder = dataset / WRITER_FOLDER
        self.was_killed = self._folder.exists()
        try:
            self._descriptor = self._acquire()
        except BlockingIOError as error:
            raise UserError(
                f"{dataset}: {self._holder()} writes this dataset. "
                "Wait until it has finished, or stop it; reading is possible meanwhile."
            ) from error
        except OSError as error:
            raise UserError(f"{dataset}: cannot be written ({error.strerror}). Check its owner and mode.") from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _acquire(self) -> int:
        path = self._folder / "lock"
        while True:
            self._folder.mkdir(exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # the previous writer removed the folder between the two calls
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A lock on a file that the previous writer has just removed protects nothing.
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _holder(self) -> str:
        try:
            return f"process {int((self._folder / 'lock').read_text())}"
        except (OSError, ValueError):
            return "another process"

    def clear_unfinished(self) -> int:
        """Delete the files that a killed writer left half-written; returns how many."""
        left = list(self._folder.glob("*.partial"))
        for path in left:
            path.unlink()
        return len(left)

    def release(self) -> None:
        """Give the lock back and remove the writer's folder."""
        self.clear_unfinished()
        (self._folder / "lock").unlink(missing_ok=True)
        # From here on the next writer may already use the folder.
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
