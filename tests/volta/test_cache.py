"""The cache of compiled things: damaged files, full disks, processes at once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pwd
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_volta.cache import Cache, digest, user_folder


class Builds:
    """A builder that counts how often it ran."""

    def __init__(self, data: bytes) -> None:
        self.data, self.count = data, 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.data


def entries(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".lock-")]


def test_an_entry_is_built_once_and_read_by_others(tmp_path: Path) -> None:
    build = Builds(b"cubin")
    assert Cache("a", tmp_path).fetch("k", build) == b"cubin"
    assert Cache("a", tmp_path).fetch("k", build) == b"cubin"
    assert Cache("b", tmp_path).fetch("k", Builds(b"other")) == b"other"
    assert build.count == 1
    assert len(entries(tmp_path)) == 2


@given(data=st.binary(max_size=300), at=st.integers(0, 400), flip=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_a_damaged_or_torn_entry_is_rebuilt(tmp_path: Path, data: bytes, at: int, flip: int) -> None:
    key = digest(data, str(at), str(flip))
    cache = Cache("damaged", tmp_path)
    cache.fetch(key, lambda: data)
    file = tmp_path / "damaged" / key
    stored = bytearray(file.read_bytes())
    torn = flip == 0 or at >= len(stored)
    if torn:
        file.write_bytes(bytes(stored[: min(at, len(stored) - 1)]))
    else:
        stored[at] ^= flip
        file.write_bytes(bytes(stored))
    build = Builds(data)
    assert cache.fetch(key, build) == data
    assert build.count == 1
    assert cache.fetch(key, build) == data
    assert build.count == 1


def test_a_failed_build_leaves_no_entry(tmp_path: Path) -> None:
    cache = Cache("a", tmp_path)

    def fail() -> bytes:
        raise RuntimeError("the compiler said no")

    with pytest.raises(RuntimeError, match="said no"):
        cache.fetch("k", fail)
    assert not entries(tmp_path)
    assert cache.fetch("k", Builds(b"x")) == b"x"


def test_keys_tell_parts_apart() -> None:
    keys = [digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("ab", "c", ""), digest(b"ab", "c")]
    assert len(set(keys)) == 4
    assert keys[0] == keys[4]


def test_the_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "fastattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_folder() == Path("/home/somebody/.cache/fastattn")


def _fetch_on_a_full_disk(folder: Path, answers: multiprocessing.SimpleQueue[object]) -> None:
    """Every write past 64 bytes of a file fails here, as it would half way through an entry."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    cache, build = Cache("full", folder), Builds(b"y" * 1000)
    same = cache.fetch("k", build) == cache.fetch("k", build) == build.data
    answers.put((same, build.count, [f.name for f in entries(folder)]))


def test_a_full_disk_keeps_the_entry_in_memory(tmp_path: Path) -> None:
    answers: multiprocessing.SimpleQueue[object] = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("spawn").Process(
        target=_fetch_on_a_full_disk, args=(tmp_path, answers)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answers.get() == (True, 1, [])


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/below"])
def test_an_unwritable_folder_keeps_the_entry_in_memory(where: str) -> None:
    cache, build = Cache("a", Path(where)), Builds(b"z")
    assert cache.fetch("k", build) == cache.fetch("k", build) == b"z"
    assert build.count == 1


def test_a_user_without_a_home_keeps_entries_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user id has no entry in the password file."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    cache, build = Cache("a"), Builds(b"z")
    assert cache.fetch("k", build) == cache.fetch("k", build) == b"z"
    assert cache.path("k", build).read_bytes() == b"z"
    assert build.count == 1


@pytest.mark.parametrize("writable", [True, False])
def test_a_shared_object_loads_from_its_entry(tmp_path: Path, writable: bool) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    (tmp_path / "f.cpp").write_text('extern "C" int answer() { return 42; }\n')

    def build() -> bytes:
        built = tmp_path / "f.so"
        run = ["g++", "-shared", "-fPIC", "-o", str(built), str(tmp_path / "f.cpp")]
        subprocess.run(run, check=True)
        return built.read_bytes()

    root = tmp_path / "cache" if writable else Path("/proc/nowhere")
    path = Cache("so", root).path(digest("f"), build)
    assert ctypes.CDLL(str(path)).answer() == 42


def _fetch_slowly(folder: Path, log: Path, answers: multiprocessing.SimpleQueue[object]) -> None:
    def build() -> bytes:
        time.sleep(0.2)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return b"w" * 100_000

    answers.put(Cache("busy", folder).fetch("k", build) == b"w" * 100_000)


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    log = tmp_path / "log"
    processes = [
        context.Process(target=_fetch_slowly, args=(tmp_path / "cache", log, answers)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert all(answers.get() for _ in processes)
    assert len(log.read_text().split()) == 1
    assert [f.name for f in entries(tmp_path / "cache")] == ["k"]
