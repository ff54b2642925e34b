"""Files that are old or new: kills while saving, broken files, the previous one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from ebbtide.checkpoint import (
    CheckpointError,
    is_sealed,
    previous_of,
    problem_of,
    whole_file,
    write_file,
)
from ebbtide.torch import load, save


def content(version: int, size: int = 1000) -> dict[str, object]:
    return {"version": version, "values": torch.full((size,), float(version))}


def assert_whole(loaded: dict[str, object]) -> int:
    version = loaded["version"]
    assert isinstance(version, int)
    values = loaded["values"]
    assert isinstance(values, torch.Tensor)
    assert (values == version).all()
    return version


def test_a_file_is_one_of_torchs_with_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(content(1), path)
    assert is_sealed(path)
    assert problem_of(path) is None
    for mmap in (False, True):
        assert assert_whole(torch.load(path, weights_only=True, mmap=mmap)) == 1
        assert assert_whole(load(path, mmap=mmap)) == 1
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_the_previous_file_is_kept_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for version in range(3):
        save(content(version), path)
    assert assert_whole(load(path)) == 2
    assert assert_whole(load(previous_of(path))) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.pt.previous"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero_the_end(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size - 200)
    os.truncate(path, size)


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, zero_the_end, Path.unlink])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_broken_file_is_named_and_the_previous_one_used(
    tmp_path: Path, damage: object, sealed: bool
) -> None:
    path = tmp_path / "a.pt"
    save(content(1), path)
    save(content(2), path)
    if not sealed:
        torch.save(content(3), path)
    assert callable(damage)
    damage(path)
    with pytest.warns(UserWarning, match=r"a\.pt is (broken|missing).*loading .*a\.pt\.previous"):
        assert assert_whole(load(path)) == 1


def test_two_broken_files_are_both_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for version in (1, 2):
        save(content(version), path)
    for each in (path, previous_of(path)):
        flip_a_bit(each)
    with pytest.raises(CheckpointError, match=r"a\.pt is broken.*a\.pt\.previous is broken"):
        load(path)


def test_no_file_at_all_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        load(tmp_path / "a.pt")


def test_a_broken_file_never_replaces_a_whole_previous_one_alone(tmp_path: Path) -> None:
    """At no moment of a save over a broken file is there no whole file."""
    path = tmp_path / "a.pt"
    save(content(1), path)
    save(content(2), path)
    flip_a_bit(path)
    seen: list[int] = []

    def watched(kind: str) -> object:
        call = getattr(os, kind)

        def wrapper(*args: object) -> None:
            call(*args)
            seen.append(assert_whole(torch.load(whole_file(path)[0], weights_only=True)))

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched("replace"))
        patch.setattr(os, "link", watched("link"))
        save(content(3), path)
    assert seen == [1, 3, 3]


def test_everything_is_on_the_disk_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.append(f"{source.name} becomes {target.name}")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    save(content(1), path)
    assert events == ["fsync .a.pt.new", ".a.pt.new becomes a.pt", f"fsync {tmp_path.name}"]
    events.clear()
    save(content(2), path)
    assert events == [
        "fsync .a.pt.new",
        ".a.pt.new becomes a.pt",
        ".a.pt.old becomes a.pt.previous",
        f"fsync {tmp_path.name}",
    ]


def test_without_hard_links_the_previous_file_is_kept_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    for version in range(3):
        save(content(version), path)
    assert assert_whole(load(path)) == 2
    assert assert_whole(load(previous_of(path))) == 1
    flip_a_bit(path)
    save(content(3), path)
    assert assert_whole(load(path)) == 3
    assert assert_whole(load(previous_of(path))) == 1


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(content(1), path)
    with pytest.raises(AttributeError, match="local"):  # a closure cannot be pickled
        save({"step": lambda: 0}, path)
    with pytest.raises(ValueError, match="zip archive"):
        write_file(path, lambda file: file.write(b"no archive"))
    assert assert_whole(load(path)) == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "latest.pt"
    link.symlink_to(tmp_path / "disk" / "a.pt")
    save(content(1), link)
    assert link.is_symlink()
    assert assert_whole(load(link)) == 1


def test_numpys_archives_carry_a_checksum_too(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_file(path, lambda file: np.savez(file, w=np.arange(5)))
    assert problem_of(path) is None
    assert np.load(path)["w"].tolist() == [0, 1, 2, 3, 4]
    flip_a_bit(path)
    assert problem_of(path) == "its checksum differs from its content"


def test_a_legacy_file_is_read_unchecked(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(content(1), path, _use_new_zipfile_serialization=False)
    assert assert_whole(load(path)) == 1


def test_a_file_without_crcs_is_no_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(1), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert assert_whole(load(path)) == 1


# Imports torch once; for each line "FIRST COUNT" it forks a process that saves, and prints its id.
# On the line "wait" it waits for all and prints their statuses.
SAVER = """
import os, sys, torch
from ebbtide.torch import save
torch.set_num_threads(1)
children = []
for line in sys.stdin:
    if line == "wait\\n":
        print(*[os.waitpid(child, 0)[1] for child in children], flush=True)
        children = []
        continue
    first, count = map(int, line.split())
    child = os.fork()
    if child == 0:
        for version in range(first, first + count):
            values = torch.full((100_000,), float(version))
            save({"version": version, "values": values}, sys.argv[1])
        os._exit(0)
    children.append(child)
    print(child, flush=True)
"""


class Savers:
    """Processes that save to one file again and again."""

    def __init__(self, path: Path) -> None:
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, line: str) -> list[int]:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(line + "\n")
        self._nursery.stdin.flush()
        return [int(number) for number in self._nursery.stdout.readline().split()]

    def start(self, first: int = 0, count: int = 10**9) -> int:
        """Start a process that saves versions from `first` on; returns its id."""
        return self._ask(f"{first} {count}")[0]

    def wait(self) -> list[int]:
        """Wait for the processes started; returns their statuses."""
        return self._ask("wait")

    def stop(self) -> None:
        self._nursery.kill()
        self._nursery.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.pt"


@pytest.fixture
def savers(path: Path) -> Iterator[Savers]:
    savers = Savers(path)
    yield savers
    savers.stop()


def test_a_saver_waits_for_the_one_before(path: Path) -> None:
    second = threading.Thread(target=save, args=(content(2), path))

    def first(file: BinaryIO) -> None:
        torch.save(content(1), file)
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive()

    write_file(path, first)
    second.join(timeout=60)
    assert assert_whole(load(path)) == 2
    assert assert_whole(load(previous_of(path))) == 1


def test_savers_of_one_file_take_turns(path: Path, savers: Savers) -> None:
    for _ in range(3):
        savers.start(count=20)
    assert savers.wait() == [0, 0, 0]
    assert_whole(load(path))
    assert_whole(load(previous_of(path)))
    assert sorted(os.listdir(path.parent)) == ["a.pt", "a.pt.previous"]


def wait_for(path: Path, limit_seconds: float = 60) -> None:
    end = time.monotonic() + limit_seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path} in {limit_seconds} s"
        time.sleep(0.0005)


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_while_saving_leaves_the_old_file_or_the_new(
    path: Path, savers: Savers, kills: int
) -> None:
    version, interrupted = 0, 0
    temporary = path.with_name(".a.pt.new")
    save(content(version), path)
    for kill in range(kills):
        temporary.unlink(missing_ok=True)
        child = savers.start(first=version + 1)
        wait_for(temporary)
        time.sleep(0.0005 * (kill % 40))  # anywhere in the few milliseconds of a save
        os.kill(child, signal.SIGKILL)
        assert savers.wait() == [signal.SIGKILL]
        interrupted += temporary.exists()
        assert problem_of(path) is None
        now = assert_whole(torch.load(path, weights_only=True))
        assert now >= version
        version = now
    assert interrupted > 0
    assert set(os.listdir(path.parent)) <= {"a.pt", "a.pt.previous", ".a.pt.new", ".a.pt.old"}
    save(content(version + 1), path)
    assert assert_whole(load(path)) == version + 1
    assert sorted(os.listdir(path.parent)) == ["a.pt", "a.pt.previous"]
