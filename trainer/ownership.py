"""Who owns a run folder: one process at a time, on any node that sees the folder.

The folder `.owner` holds files 1, 2, 3, ...; the highest names the owner. A file is made by link(), which one process
alone can do on every shared file system, and the highest is never deleted: who finds its owner gone makes the next one,
and only one of several can. So a takeover has no moment in which nobody, or two, own the folder. While the owner lives
a thread renews the file's time (heartbeat); an owner that leaves sets it to 0, which needs no room on a full disk.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from trainer.errors import UserError

log = logging.getLogger(__name__)

INTERVAL = 10.0  # seconds between heartbeats
PATIENCE = 6 * INTERVAL  # without one for so long, an owner that cannot be looked up is gone

_held: set[Path] = set()  # files of this process


@dataclass(frozen=True)
class Owner:
    """A process, so that it cannot be mistaken for another: host with boot and process namespace, pid with start
    time."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: str  # by the clock of the host's kernel
    since: str  # for people

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), _boot(), _namespace(), os.getpid(), _started(os.getpid()), since)

    def same_process(self, other: "Owner") -> bool:
        """Whether both are one process, whenever it came to own."""
        return {**asdict(self), "since": ""} == {**asdict(other), "since": ""}

    def lives(self) -> bool | None:
        """Whether the process is there; None where that cannot be seen from here."""
        if not self.boot or (self.host, self.boot, self.namespace) != (socket.gethostname(), _boot(), _namespace()):
            return None
        return _started(self.pid) == self.started != ""


class Ownership:
    """Context in which this process owns a run folder.

    Args:
        folder: the run folder; it is made.
        interval: seconds between heartbeats; patience: seconds without one after which an owner elsewhere is gone.

    Entering raises UserError, one line, when another process owns the folder, or when the folder cannot be written.
    Where the owner's host cannot be looked at, entering waits until its heartbeat is seen or has been missing for
    `patience`.
    """

    def __init__(self, folder: Path, interval: float = INTERVAL, patience: float = PATIENCE):
        self.folder, self.interval, self.patience = folder, interval, patience
        self._home = folder.absolute() / ".owner"
        self._mine: Path | None = None
        self._me = Owner.me()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Ownership":
        try:
            self._take()
        except OSError as error:
            raise UserError(
                f"run.dir={self.folder} cannot be written ({error.strerror}); choose another folder"
            ) from error
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._mine is not None:
            _held.discard(self._mine)
            with suppress(OSError):  # of a read-only disk: then it is seen that this process has gone
                os.utime(self._mine, (0, 0))

    def _take(self) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        draft = self._write(self._me)
        try:
            while True:
                number = max((n for n in map(_number, self._home.iterdir()) if n), default=0)
                while (owner := self._home / str(number)).exists():  # a listing may be older than the folder
                    if number and self._is_alive(owner, draft):
                        raise UserError(self._refusal(owner))
                    number += 1
                if not number:
                    number, owner = 1, self._home / "1"
                if not _link(draft, owner):
                    continue
                above = [n for n in map(_number, self._home.iterdir()) if n and n > number]
                if above:  # this process slept between looking and linking
                    owner.unlink()
                    continue
                self._mine = owner
                _held.add(owner)
                self._sweep(number)
                return
        finally:
            draft.unlink(missing_ok=True)

    def _write(self, owner: Owner) -> Path:
        """A complete file of its own name, which link() or rename() puts in place."""
        path = self._home / f"draft-{uuid.uuid4().hex}"
        with path.open("w") as file:
            json.dump(asdict(owner), file)
            file.flush()
            os.fsync(file.fileno())
        return path

    def _is_alive(self, path: Path, draft: Path) -> bool:
        """Whether the owner in a file lives; waits where only its heartbeat can tell."""
        owner = _read(path)
        alive = owner.lives() if owner is not None else None
        if _time(path) == 0 or (owner is not None and owner.same_process(self._me)):
            return path in _held
        if alive is not None:
            return alive
        seen, deadline, said = _time(path), time.monotonic() + self.patience, False
        os.utime(draft)  # by the clock of the file system, as heartbeats are
        if _time(draft) - seen > self.patience:
            return False
        while time.monotonic() < deadline:
            if not said:
                host = owner.host if owner is not None else "an unknown host"
                log.info(
                    "%s was owned from %s; waiting up to %.0f s for its heartbeat", self.folder, host, self.patience
                )
                said = True
            time.sleep(min(0.5, self.interval / 4))
            if _time(path) != seen:
                owner = _read(path)
                return owner is None or owner.lives() is not False
        return False

    def _refusal(self, path: Path) -> str:
        owner = _read(path)
        who = "another process" if owner is None else f"process {owner.pid} on {owner.host} since {owner.since}"
        return f"run.dir={self.folder} is in use by {who}; wait for it, end it, or choose another run.dir"

    def _sweep(self, number: int) -> None:
        """Remove what earlier owners left, but drafts that may be of a process at work."""
        with suppress(OSError):
            for path in self._home.iterdir():
                old = _number(path)
                if (old and old < number) or (old is None and time.time() - _time(path) > 24 * 3600):
                    path.unlink(missing_ok=True)

    def _beat(self) -> None:
        assert self._mine is not None
        above = self._mine.with_name(str(int(self._mine.name) + 1))
        while not self._over.wait(self.interval):
            try:
                if above.exists() or not self._mine.exists():
                    break
                os.utime(self._mine)
            except OSError as error:
                log.warning("heartbeat in %s failed (%s)", self._home, error.strerror)
        else:
            return
        # Held up for longer than others wait. Whatever this process wrote from here on would mix with the new owner's.
        print(f"trainer.train: error: run.dir={self.folder} was removed or taken over; stopping", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)


def _link(draft: Path, name: Path) -> bool:
    """Give a finished file its name, unless there is one of that name."""
    try:
        os.link(draft, name)
    except FileExistsError:
        return draft.stat().st_nlink == 2  # the answer to a first request may get lost: NFS asks again
    except OSError:  # a file system without links: creating is atomic there too, the content comes a moment later
        try:
            with name.open("x") as file:
                file.write(draft.read_text())
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> Owner | None:
    """The owner in a file; None where it is not one, such as a file that is being written."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(path: Path) -> int | None:
    return int(path.name) if path.name.isdecimal() else None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start of a process in ticks since boot; "" for none, and for one that has ended and waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
