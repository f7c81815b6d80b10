"""The storage folder: what it says when the system does not answer, and what it says is absent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from narseal.config import UploadConfig
from narseal.errors import Refused, StorageFull, StorageGone, Unavailable
from narseal.nix.cache_info import CacheInfo
from narseal.pipeline.uploads.arriving import ArrivingFile
from narseal.runtime.files import OpenFile, open_regular
from narseal.runtime.threads import ThreadPools
from narseal.storage import LocalStorage
from narseal.storage.folder import Folder
from narseal.storage.upload_room import UploadRoom
from narseal.storage.uploaded import UploadedFiles
from narseal.storage.waiting import WaitingFiles
from narseal.storage.weighing import Weighed, weighed
from tests.tools.waiting import PATIENCE, until

_BLOCK = 4096
_TOO_LONG = "x" * 300  # ENAMETOOLONG


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return prepared(tmp_path / "storage")


def prepared(root: Path) -> LocalStorage:
    """A folder with a mark."""
    LocalStorage(f"file://{root}").prepare(CacheInfo("/nix/store"))
    (root / ".narseal/identity").write_text("here\n")
    return LocalStorage(f"file://{root}", "here")


def room_of(
    storage: LocalStorage,
    most: int = 1 << 30,
    workers: int = 1,
    clock: Callable[[], float] = monotonic,
) -> UploadRoom:
    """For uploads that wait for at most an hour."""
    return UploadRoom(storage, most=most, max_age=3600, workers=workers, clock=clock)


def upload(storage: LocalStorage, data: bytes) -> OpenFile:
    """A file on its way in."""
    file = OpenFile.incoming(storage.incoming())
    file.write(data)
    return file


ASKED: list[Callable[[LocalStorage], Any]] = [
    lambda storage: storage.lacks(_TOO_LONG),
    lambda storage: storage.read(_TOO_LONG),
    lambda storage: storage.open(_TOO_LONG),
    lambda storage: storage.remove(_TOO_LONG),
    lambda storage: storage.names(_TOO_LONG),
    lambda storage: storage.open_upload(_TOO_LONG),
    lambda storage: storage.discard_upload(_TOO_LONG),
    lambda storage: LocalStorage(f"file://{storage.root}/{_TOO_LONG}").mark(),
]


@pytest.mark.parametrize("ask", ASKED)
def test_what_the_system_says_is_trouble_of_storage(
    ask: Callable[[LocalStorage], Any], storage: LocalStorage
) -> None:
    """It was an OSError that nobody caught: 500, or a traceback."""
    with pytest.raises(Unavailable, match=r"storage fails: .*name too long"):
        ask(storage)


def test_only_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Too many open files, or no permission, says nothing of what is in a file."""
    there = tmp_path / "file"
    there.touch()
    link = tmp_path / "link"
    link.symlink_to(there)
    for path in (tmp_path / "missing", link):
        with pytest.raises(Refused):
            open_regular(path)
    for path in (there / "below", tmp_path / _TOO_LONG):
        with pytest.raises(OSError, match=r"Not a directory|File name too long"):
            open_regular(path)


def test_an_arriving_file_that_cannot_be_cut_is_dropped(storage: LocalStorage) -> None:
    """What failed then was told, instead of what the uploader had done."""
    arriving = ArrivingFile(storage, room_of(storage), UploadConfig())
    arriving.write(b"log")
    file = arriving.whole()
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(other, file.descriptor)  # cannot be cut
    os.close(other)
    arriving.discard()
    assert not list((storage.root / ".narseal/arriving").iterdir())


def test_a_folder_that_is_not_the_indexs_has_no_names(storage: LocalStorage) -> None:
    """They were none, as if nothing waited and nothing could be put back."""
    waiting = WaitingFiles(storage)
    assert not [*storage.narinfos(), *storage.refused_narinfos(), *waiting.take("me", ["it"])]
    waiting.keep("me", "it", "log/x", upload(storage, b"log"))
    assert [name for _, name, _ in waiting.take("me", ["it"])] == ["log/x"]
    assert waiting.take("you", ["it"]) == []
    [(_, _, lies)] = waiting.take("me", ["it"])
    storage.root.rename(storage.root.with_name("volume"))
    for is_empty in (False, True):  # there is none, or an empty mount point
        if is_empty:
            storage.root.mkdir()
        for ask in (
            storage.narinfos,
            storage.refused_narinfos,
            lambda: waiting.take("me", ["it"]),
            lambda: waiting.publish(lies, "log/x", lambda _: nullcontext()),
            lambda: waiting.drop(lies),
        ):
            with pytest.raises(StorageGone):
                ask()


def test_what_waited_takes_no_room_where_a_file_is_already(storage: LocalStorage) -> None:
    waiting = WaitingFiles(storage)
    asked = []

    @contextmanager
    def room(size: int) -> Iterator[None]:
        asked.append(size)
        if size > 4:
            raise StorageFull("none")
        yield

    for data in (b"one", b"two"):
        waiting.keep("me", "it", "log/there", upload(storage, data))
        [(_, name, lies)] = waiting.take("me", ["it"])
        waiting.publish(lies, name, room)
        assert waiting.take("me", ["it"]) == []
        waiting.publish(lies, name, room)  # somebody was faster
    waiting.keep("me", "it", "log/large", upload(storage, b"too much"))
    [(_, name, lies)] = waiting.take("me", ["it"])
    with pytest.raises(StorageFull):
        waiting.publish(lies, name, room)
    assert waiting.take("me", ["it"]) == [("it", name, lies)]
    assert asked == [3, 8]
    assert storage.read("log/there") == b"one"
    assert storage.lacks("log/large")


def take(uploaded: UploadedFiles, size: int) -> None:
    with uploaded.room(size):
        pass


def test_a_full_folder_is_not_weighed_for_each_upload(storage: LocalStorage) -> None:
    now = 0.0
    uploaded = UploadedFiles(storage, most=16 * _BLOCK, workers=1, clock=lambda: now)
    logs = storage.root / "log"
    logs.mkdir()
    for number in range(15):
        (logs / str(number)).write_bytes(b"x")
    with pytest.raises(StorageFull):
        take(uploaded, 2 * _BLOCK)
    for number in range(4):
        (logs / str(number)).unlink()
    with pytest.raises(StorageFull):  # nobody looked
        take(uploaded, 2 * _BLOCK)
    take(uploaded, _BLOCK)  # what finds room is taken meanwhile
    with pytest.raises(StorageFull):
        take(uploaded, _BLOCK)
    now = 10.0
    take(uploaded, 2 * _BLOCK)


def arrive(storage: LocalStorage, room: UploadRoom, size: int, name: str = "") -> None:
    """Let a NAR of a size wait, under its own name or another."""
    incoming = storage.arriving()
    try:
        room.reserve(incoming[0], size)
        storage.keep_upload(incoming[1], name or incoming[1].name)
    finally:
        storage.discard(incoming)


def test_uploads_that_wait_are_not_looked_at_for_each_that_comes(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who left 20,000 small ones made each path of the others cost 157 ms instead of 3."""
    looks = 0

    def counted(folder: Path) -> Iterator[Weighed]:
        nonlocal looks
        looks += folder == storage.uploads
        return weighed(folder)

    monkeypatch.setattr("narseal.storage.upload_room.weighed", counted)
    room = room_of(storage, most=4000 * _BLOCK, workers=2)
    for _ in range(400):
        arrive(storage, room, 4)
    assert looks == 1
    for _ in range(200):  # a worker's share of what may come between two looks is 500
        arrive(storage, room, 4)
    assert looks == 2


def test_uploads_count_as_they_lie_on_disk_and_go_when_they_are_old(storage: LocalStorage) -> None:
    room = room_of(storage, most=4 * _BLOCK)
    for _ in range(4):
        arrive(storage, room, 1)
    with pytest.raises(StorageFull):
        arrive(storage, room, 1)
    assert not list((storage.root / ".narseal/arriving").iterdir())
    first, *_ = storage.uploads.iterdir()
    os.utime(first, (0, 0))
    until(lambda: not _fails(lambda: arrive(storage, room, 1)))
    assert not first.exists()


def test_the_workers_uploads_stay_together_within_the_bound(storage: LocalStorage) -> None:
    rooms = [room_of(storage, most=64 * _BLOCK, workers=4) for _ in range(4)]
    taken = 0
    for turn in range(200):  # one by one the others come when little room is left, and look
        with suppress(StorageFull):
            arrive(storage, rooms[0 if turn < 60 else turn % 4], 1)
            taken += 1
    assert 40 <= taken <= 64


def test_a_look_that_fails_leaves_the_bound(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted half of what lies there, and the next uploads found room."""
    for _ in range(8):
        arrive(storage, room_of(storage), 1)
    room = room_of(storage, most=8 * _BLOCK)
    *_, last = storage.uploads.iterdir()
    os.utime(last, (0, 0))
    monkeypatch.setattr(os, "unlink", _fail)
    for _ in range(2):
        incoming = storage.arriving()
        with pytest.raises(Unavailable):
            room.reserve(incoming[0], 1)
        os.close(incoming[0])


def _fail(path: str) -> None:
    raise PermissionError(13, "no", path)


def test_a_folder_of_an_uploader_goes_when_nothing_waits_in_it(storage: LocalStorage) -> None:
    waiting = WaitingFiles(storage)
    waiting.keep("me", "it", "log/x", upload(storage, b"log"))
    waiting.keep("you", "it", "log/x", upload(storage, b"log"))
    [(_, _, lies)] = waiting.take("me", ["it"])
    waiting.drop(lies)
    arrive(storage, room_of(storage), 1)
    assert storage.names(".narseal/waiting") == ["you"]
    waiting.keep("me", "it", "log/x", upload(storage, b"log"))
    assert len(waiting.take("me", ["it"])) == 1


def test_while_all_room_is_taken_looks_take_a_part_of_the_time(storage: LocalStorage) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5  # so much does a look take
        return now

    room = room_of(storage, most=4 * _BLOCK, clock=clock)
    for _ in range(4):
        arrive(storage, room, 1)
    assert _fails(lambda: arrive(storage, room, 1))
    for waiting in storage.uploads.iterdir():
        waiting.unlink()
    turns = 0
    while _fails(lambda: arrive(storage, room, 1)):
        turns += 1
    assert 5 < turns < 20


def _fails(act: Callable[[], object]) -> bool:
    try:
        act()
    except StorageFull:
        return True
    return False


def test_what_another_folder_has_is_not_weighed(storage: LocalStorage) -> None:
    uploaded = UploadedFiles(storage, most=16 * _BLOCK, workers=1)
    storage.root.rename(storage.root.with_name("volume"))
    with pytest.raises(StorageGone):
        take(uploaded, 1)


def test_what_has_room_counts_before_it_has_its_name(storage: LocalStorage) -> None:
    uploaded = UploadedFiles(storage, most=16 * _BLOCK, workers=1)
    with ExitStack() as rooms:
        for _ in range(16):  # it is weighed in between, and none of them is there yet
            rooms.enter_context(uploaded.room(_BLOCK))
        with pytest.raises(StorageFull):
            take(uploaded, _BLOCK)


def test_of_two_files_of_one_name_the_first_stays(storage: LocalStorage) -> None:
    files = [OpenFile.incoming(storage.incoming()) for _ in range(2)]
    for number, file in enumerate(files):
        file.write(b"%d" % number)
        assert file.path
        assert storage.publish_new(file.descriptor, file.path, "log/one") == (number == 0)
    assert storage.read("log/one") == b"0"


def test_one_of_a_group_that_cannot_be_published_is_nobody_elses_trouble(
    storage: LocalStorage,
) -> None:
    files = [(upload(storage, b"%d" % n), f"nar/{n}") for n in range(3)]
    assert files[1][0].path
    files[1][0].path.unlink()
    outcomes = storage.publish_each(files)
    assert [type(outcome) for outcome in outcomes] == [type(None), Unavailable, type(None)]
    assert [storage.read(name) for _, name in files] == [b"0", None, b"2"]
    del files
    assert storage.names("nar") == ["0", "2"]
    assert not list((storage.root / ".narseal/incoming").iterdir())


async def test_a_large_file_holds_up_no_group(storage: LocalStorage) -> None:
    """The disk may take seconds for it."""
    goes_on = threading.Event()

    class SlowDisk(LocalStorage):
        def publish_each(self, files: Sequence[tuple[OpenFile, str]]) -> list[Unavailable | None]:
            if any(file.size > 1 << 20 for file, _ in files):
                goes_on.wait(PATIENCE)
            return super().publish_each(files)

    threads = ThreadPools(transfers=1)
    folder = Folder(SlowDisk(f"file://{storage.root}", "here"), threads)
    running = asyncio.create_task(folder.run())
    large = asyncio.create_task(
        folder.publish_in_group(upload(storage, bytes(2 << 20)), "nar/large")
    )
    await asyncio.sleep(0)
    await folder.publish_in_group(upload(storage, b"small"), "nar/small")
    assert not large.done()
    goes_on.set()
    await large
    assert storage.names("nar") == ["large", "small"]
    await folder.close()
    await running
    threads.close()


_TOGETHER = """
import sys
from narseal.errors import Unavailable
from narseal.storage import LocalStorage
try:
    LocalStorage(sys.argv[1]).write_all({"a": b"new", "b": b"new"}, together=True)
except Unavailable as error:
    print(error)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_many_files_are_synced_at_once_before_the_first_has_its_name(
    storage: LocalStorage, tmp_path: Path, fails: bool
) -> None:
    storage.write("a", b"old")
    trace = tmp_path / "trace"
    inject = ["-e", "inject=syncfs:error=EIO"] if fails else []
    done = subprocess.run(
        ["strace", "-f", "-y", "-o", trace, "-e", "trace=syncfs,fsync,rename", *inject,
         sys.executable, "-c", _TOGETHER, f"file://{storage.root}"],
        capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in trace.read_text().splitlines() if str(storage.root) in line]
    calls = [line.split(maxsplit=1)[1].partition("(")[0] for line in lines]
    if fails:
        assert (done.stdout[:13], calls) == ("storage fails", ["syncfs"]), done.stderr
        assert (storage.read("a"), storage.read("b")) == (b"old", None)
    else:
        assert calls == ["syncfs", "rename", "rename", "fsync"], done.stderr
        assert (storage.read("a"), storage.read("b")) == (b"new", b"new")
    assert not any((storage.root / ".narseal/incoming").iterdir())
