"""Sweeps in a real PostgreSQL, which the tests start and stop."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.storage import open_storage
from tests.postgres import Server, needs_postgres, server
from tests.sweeps import (
    assert_one_record_a_cell,
    children,
    finish,
    is_alive,
    lines,
    looking_into,
    running,
    wait_until,
    write_function,
)
from tests.test_sweep_kill import BODY, COMMAND, MOST_KILLS, STORM_BODY, kill_one_of, started

pytestmark = needs_postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with server() as running_server:
        yield running_server


@pytest.mark.slow
def test_workers_share_a_sweep_and_make_good_for_the_killed(
    tmp_path: Path, postgres: Server
) -> None:
    write_function(tmp_path, BODY)
    command = [*COMMAND, "--seeds", "2", "--study", "shared", "--storage", postgres.url]
    join = ["worker", "shared", "--storage", postgres.url]
    with running(*command, cwd=tmp_path) as first:
        wait_until(lambda: len(started(tmp_path)) == 1)
        with running(*join, cwd=tmp_path) as second, running(*join, cwd=tmp_path) as third:
            wait_until(lambda: len(started(tmp_path)) == 3)
            for process in (first, second):
                process.kill()
                process.wait()
            # The command again, while a worker is at work: its cell is left to it.
            with running(*command, cwd=tmp_path) as again:
                wait_until(lambda: len(started(tmp_path)) == 4)
                (tmp_path / "gate").touch()
                _, err = again.communicate(timeout=60)
                assert again.returncode == 1, err
                assert "2 cells failed" in err
            third.wait(60)
    with looking_into(postgres.url, "shared") as found:
        assert_one_record_a_cell(found)
        assert found.queue.counts().outcomes == {"finished": 6, "failed": 2}
    ends = [line for line in lines(tmp_path / "log") if line.startswith("end")]
    assert len(ends) == 8


@pytest.mark.slow
def test_a_server_that_goes_away_is_one_line_and_loses_nothing(
    tmp_path: Path, postgres: Server
) -> None:
    write_function(tmp_path, BODY)
    command = [*COMMAND, "--study", "away", "--storage", postgres.url]
    with running(*command, cwd=tmp_path) as process:
        wait_until(lambda: len(started(tmp_path)) == 1)
        cells = children(process.pid)
        postgres.stop()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot be used: " in err.splitlines()[-1]
    assert "the same command goes on" in err.splitlines()[-1]
    assert not any(map(is_alive, cells))
    assert finish("report", "away", "--storage", postgres.url, cwd=tmp_path).returncode == 2
    postgres.start()
    (tmp_path / "gate").touch()
    assert finish(*command, cwd=tmp_path).returncode == 1
    with looking_into(postgres.url, "away") as found:
        assert_one_record_a_cell(found)


def test_numbers_that_are_none_and_hostile_text_survive_the_database(
    tmp_path: Path, postgres: Server
) -> None:
    body = """
    print("\\0 \\x1b[31m \\ud83d' OR 1=1; --".encode("utf8", "surrogatepass").decode("latin1"))
    s.report(1, float("nan"))
    if s.weight_decay: raise ValueError("\\0 \\ud800 \\U0001F600 '; DROP TABLE trials; --")
    return float("nan") if s.lr > 0.005 else float("inf")
    """
    write_function(tmp_path, body)
    command = [*COMMAND, "--study", "hostile", "--storage", postgres.url, "--json"]
    assert finish(*command, cwd=tmp_path).returncode == 1
    with looking_into(postgres.url, "hostile") as found:
        assert_one_record_a_cell(found)
        assert found.queue.counts().outcomes == {"diverged": 2, "failed": 2}
        errors = {record.error for *_, record in found.queue.cells() if record is not None}
    assert errors == {"", "ValueError:  ? \U0001f600 '; DROP TABLE trials; --"}


def test_a_password_is_not_shown(postgres: Server) -> None:
    address = postgres.url.replace("tester@", "nobody:secret@")
    with pytest.raises(InputError, match=r"nobody:\*\*\*@.* cannot be used: ") as raised:
        open_storage(address, create=True)
    assert "secret" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_kills(tmp_path: Path, postgres: Server, seed: int) -> None:
    draw = random.Random(seed)
    write_function(tmp_path, STORM_BODY)
    where = ["--storage", postgres.url]
    command = [*COMMAND, "--optimizer", "adamw,sgdw", "--seeds", "6", "--study", f"storm{seed}"]
    join = ["worker", f"storm{seed}", *where]
    kills = 0
    for _ in range(MOST_KILLS + 1):
        with (
            running(*command, *where, "--workers", "2", cwd=tmp_path) as main,
            running(*join, cwd=tmp_path) as one,
            running(*join, cwd=tmp_path) as two,
        ):
            while kills < MOST_KILLS and main.poll() is None:
                time.sleep(draw.uniform(0.02, 0.8))
                kills += kill_one_of(draw, [main.pid, one.pid, two.pid, *children(main.pid)])
            err = main.communicate(timeout=120)[1]
            if main.returncode != -signal.SIGKILL:
                break
    assert main.returncode == 1, err
    with looking_into(postgres.url, f"storm{seed}") as found:
        assert_one_record_a_cell(found)
        assert found.queue.counts().outcomes == {"finished": 36, "failed": 12}
