"""Cells in real processes: whatever the user's function does, the sweep gets over it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep import Settings
from ebbtide.lab.sweep.curve import Curve
from ebbtide.lab.sweep.outcome import Outcome, Record
from ebbtide.lab.sweep.process import Ending, Order, run_cell
from ebbtide.lab.sweep.target import Target
from ebbtide.lab.sweep.workers import _record, check_target
from tests.sweeps import is_alive, lines, wait_until, write_function

SETTINGS = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "seed": 3}


def run(file: Path, **options: object) -> Ending:
    order = Order(Target.at(file, "train"), SETTINGS, **options)  # type: ignore[arg-type]
    return run_cell(order, stopped=lambda: False)


def record(file: Path, **options: object) -> Record:
    target = Target.at(file, "train")
    return _record(run(file, **options), target, options.get("timeout"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "outcome", "value", "error"),
    [
        ("return s.lr + s.weight_decay + s.seed", Outcome.FINISHED, 3.101, ""),
        ("return {'loss': 2, 'accuracy': 0.5, 'note': 'x'}", Outcome.FINISHED, 2.0, ""),
        ("return {'accuracy': 0.5}", Outcome.FINISHED, 0.5, ""),
        ("import numpy; return numpy.float32(0.25)", Outcome.FINISHED, 0.25, ""),
        ("return float('-inf')", Outcome.DIVERGED, -float("inf"), ""),
        ("raise FloatingPointError('overflow')", Outcome.DIVERGED, None, "overflow"),
        ("raise ValueError('bad ' + s.optimizer)", Outcome.FAILED, None, "ValueError: bad adamw"),
        ("return None", Outcome.FAILED, None, "returned None, not a number"),
        ("return 'low'", Outcome.FAILED, None, "returned a str, not a number"),
        ("return {'a': 1, 'b': 2}", Outcome.FAILED, None, "choose one with --metric"),
        (
            "import numpy; s.numpy_optimizer([numpy.ones((2, 2))], lr=5, weight_decay=0.2)",
            Outcome.DIVERGED,
            None,
            "would remove a whole parameter in one step",
        ),
        ("sys.exit(3)", Outcome.FAILED, None, "SystemExit: 3"),
        ("os._exit(0)", Outcome.FAILED, None, "ended (status 0) before the function returned"),
        ("os.abort()", Outcome.FAILED, None, "ended by SIGABRT"),
        ("class E(Exception):\n    def __str__(self): 1/0\nraise E", Outcome.FAILED, None, "E: "),
        ("s.report(2**63, 1)", Outcome.FAILED, None, "a step must lie between"),
        ("input()", Outcome.FAILED, None, "EOFError"),
        ("os.closerange(3, 99); return 1", Outcome.FAILED, None, "(status 1) before the function"),
        ("os.fork(); return s.seed", Outcome.FINISHED, 3.0, ""),
        ("os.chdir('/'); return 1", Outcome.FINISHED, 1.0, ""),
        ("raise KeyboardInterrupt", Outcome.FAILED, None, "KeyboardInterrupt"),
        ("import no_such_module", Outcome.FAILED, None, "No module named 'no_such_module'"),
        ("raise ValueError('\\ud800 \\x1b[31m')", Outcome.FAILED, None, "ValueError: ? "),
        ("sys.stdout.close(); os.close(2); return 1", Outcome.FINISHED, 1.0, ""),
    ],
)
def test_outcomes(tmp_path: Path, body: str, outcome: str, value: float | None, error: str) -> None:
    found = record(write_function(tmp_path, body))
    assert (found.outcome, found.value) == (outcome, value)
    assert error in found.error


def test_nan_is_a_divergence_and_keeps_its_value(tmp_path: Path) -> None:
    found = record(write_function(tmp_path, "return float('nan')"))
    assert found.outcome == Outcome.DIVERGED
    assert found.value != found.value


def test_the_named_metric_counts(tmp_path: Path) -> None:
    file = write_function(tmp_path, "return {'loss': 2, 'accuracy': 0.5}")
    found = record(file, metric="accuracy")
    assert (found.value, found.metric) == (0.5, "accuracy")
    assert found.numbers == {"loss": 2.0, "accuracy": 0.5}
    assert "returned no 'f1', but loss, accuracy" in record(file, metric="f1").error


def test_the_traceback_begins_in_the_users_file(tmp_path: Path) -> None:
    file = write_function(tmp_path, "return helper(s)\n")
    file.write_text(file.read_text() + "\ndef helper(s):\n    raise ValueError('deep')\n")
    text = record(file).traceback
    assert text.startswith(f'Traceback (most recent call last):\n  File "{file}", line 3, in train')
    assert text.endswith("ValueError: deep\n")


def test_everything_printed_is_kept_up_to_a_limit(tmp_path: Path) -> None:
    body = """
    print("first\\x1b[31m line")
    print("to stderr", file=sys.stderr)
    os.write(1, b"from below Python\\n")
    subprocess.run(["echo", "from a child"])
    for _ in range(100_000): print("x" * 50)
    print("last")
    return 1
    """
    found = record(write_function(tmp_path, body))
    assert found.outcome == Outcome.FINISHED
    assert found.output.endswith("last\n")
    assert len(found.output) <= 8000
    short = body.replace("for _", "#")
    output = record(write_function(tmp_path, short)).output.splitlines()
    assert output == ["first line", "to stderr", "from below Python", "from a child", "last"]


def test_a_file_whose_loading_takes_longer_than_a_cell_may_is_refused(tmp_path: Path) -> None:
    file = write_function(tmp_path, "return 1")
    file.write_text(file.read_text() + "\ntime.sleep(1000)\n")
    with pytest.raises(InputError, match=r"loading it takes longer than the 0\.2 s of a cell"):
        check_target(Target.at(file, "train"), timeout=0.2)


@pytest.mark.slow
def test_hanging_cells_are_ended_and_say_where_they_were(tmp_path: Path) -> None:
    bodies = [
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "import ctypes\nctypes.PyDLL(None).sleep(1000)",  # holds the interpreter all the time
    ]
    files = [write_function(tmp_path, body, f"{i}.py") for i, body in enumerate(bodies)]
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda file: record(file, timeout=4.0), files))
    assert [cell.outcome for cell in found] == [Outcome.TIMEOUT] * 2
    assert [cell.error for cell in found] == ["ended after 4 s"] * 2
    assert all("in train" in cell.output for cell in found)


def test_a_result_counts_even_if_the_process_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbtide.lab.sweep.process._SECONDS_TO_END", 0.3)
    body = "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nreturn 5"
    found = record(write_function(tmp_path, body))
    assert (found.outcome, found.value) == (Outcome.FINISHED, 5.0)


def test_what_a_cell_started_ends_with_it(tmp_path: Path) -> None:
    body = """
    child = subprocess.Popen(["sleep", "1000"])
    print(child.pid)
    return 1
    """
    found = record(write_function(tmp_path, body))
    assert found.outcome == Outcome.FINISHED
    pid = int(found.output)
    wait_until(lambda: not is_alive(pid))


DETACHED = """
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(child.pid)
"""


@pytest.mark.parametrize(
    "body", ["time.sleep(1000)", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["hangs", "is killed"]
)
def test_a_session_of_its_own_does_not_outlast_a_cell_that_is_ended(
    tmp_path: Path, body: str
) -> None:
    found = record(write_function(tmp_path, f"{DETACHED}{body}"), timeout=4.0)
    assert found.outcome in (Outcome.TIMEOUT, Outcome.FAILED)
    pid = int(found.output.split()[0])
    wait_until(lambda: not is_alive(pid))


def test_a_session_of_its_own_may_outlast_a_cell_that_ends(tmp_path: Path) -> None:
    pid = int(record(write_function(tmp_path, f"{DETACHED}return 1")).output)
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_cell_dies_with_the_process_that_watches_it(tmp_path: Path) -> None:
    # Even while it holds the interpreter, so that no thread of it could notice.
    body = """
    open("pid", "w").write(str(os.getpid()))
    import ctypes
    ctypes.PyDLL(None).sleep(1000)
    """
    file = write_function(tmp_path, body)
    script = (
        "from pathlib import Path; from ebbtide.lab.sweep.process import *;"
        "from ebbtide.lab.sweep.target import Target;"
        f"run_cell(Order(Target.at(Path({str(file)!r}), 'train'), {SETTINGS}), stopped=bool)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as parent:
        wait_until(lambda: bool(lines(tmp_path / "pid")))
        pid = int(lines(tmp_path / "pid")[0])
        assert is_alive(pid)
        parent.kill()
        wait_until(lambda: not is_alive(pid))


def test_a_stopped_cell_ends_at_once(tmp_path: Path) -> None:
    order = Order(Target.at(write_function(tmp_path, "time.sleep(1000)"), "train"), SETTINGS)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert run_cell(order, stopped=stop.is_set).kind == "stopped"


def test_reports_make_the_curve_and_a_hopeless_cell_ends_at_one(tmp_path: Path) -> None:
    body = """
    try:
        for step in range(1000):
            s.report(step, step * 2)
            time.sleep(0.01)
    except Exception:
        pass
    return 1
    """
    order = Order(Target.at(write_function(tmp_path, body), "train"), SETTINGS)

    def hopeless(curve: Curve) -> bool:
        return curve.count > 3

    ending = run_cell(order, stopped=lambda: False, hopeless=hopeless)
    assert ending.kind == "pruned"
    assert ending.curve.points()[:3] == ((0, 0.0), (1, 2.0), (2, 4.0))
    assert ending.curve.count < 1000


def test_the_settings_arrive_and_the_generators_are_seeded(tmp_path: Path) -> None:
    body = "import numpy\nprint(s, random.random(), numpy.random.rand())\nreturn 0"
    file = write_function(tmp_path, body)
    file.write_text("import numpy\n" + file.read_text())
    first, second = record(file).output, record(file).output
    assert first == second
    assert first.startswith("Settings(optimizer='adamw', lr=0.001, weight_decay=0.1, seed=3)")


def test_threads_are_shared_out_unless_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    body = "print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])\nreturn 0"
    assert record(write_function(tmp_path, body), threads=3).output == "3 7\n"


def test_a_file_is_imported_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 4")
    file = write_function(tmp_path, "from beside import VALUE\nreturn VALUE", "random.py")
    assert record(file).value == 4


def test_a_file_is_compiled_by_its_own_rules(tmp_path: Path) -> None:
    file = write_function(tmp_path, "return train.__annotations__['s'] is int")
    file.write_text(file.read_text().replace("train(s)", "train(s: int)"))
    assert record(file).value == 1


def test_processes_that_the_function_spawns_find_it(tmp_path: Path) -> None:
    body = """
    import multiprocessing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(double, [4])[0]
    """
    file = write_function(tmp_path, body)
    file.write_text(file.read_text() + "\ndef double(x): return 2 * x\n")
    found = record(file)
    assert found.value == 8, found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import no_such_module\ndef train(s): ...", "No module named 'no_such_module'"),
        ("if True:\n    train = 3", "defines no function 'train'"),
        ("def train(): return 1", "must take one argument, the settings; it takes ()"),
        ("def train(a, b): return 1", "it takes (a, b)"),
        ("def train(s): yield 1", "must return a number, not wait or yield"),
        ("import os; os._exit(4)\ndef train(s): ...", "its process ended (status 4)"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_the_sweep(
    tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "train.py"
    file.write_text(text)
    with pytest.raises(InputError) as raised:
        check_target(Target.at(file, "train"))
    assert says in str(raised.value)


def test_a_file_that_loads_for_long_is_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbtide.lab.sweep.workers._SECONDS_OF_LOADING", 0.0)
    file = write_function(tmp_path, "return 1")
    file.write_text("import time; time.sleep(0.3)\n" + file.read_text())
    said: list[str] = []
    check_target(Target.at(file, "train"), say=said.append)
    assert said == ["loading train.py takes long; what its top level does, every cell does"]


def test_versions_of_what_the_file_loads_are_noted(tmp_path: Path) -> None:
    file = write_function(tmp_path, "return 1")
    file.write_text("import numpy\n" + file.read_text())
    assert set(check_target(Target.at(file, "train"))) == {"numpy"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train.py", "write FILE.py:FUNCTION"),
        ("missing.py:train", "cannot be read: No such file"),
        (".:train", "cannot be read: Is a directory"),
        ("train.py:tain", "defines no 'tain'; it defines train"),
        ("broken.py:train", "line 1: "),
        ("zeros.py:train", "null bytes"),
    ],
)
def test_targets_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_function(tmp_path, "return 1").write_text("def train(s): ...")
    (tmp_path / "broken.py").write_text("def train(s) return")
    (tmp_path / "zeros.py").write_bytes(b"a\0")
    with pytest.raises(InputError) as raised:
        Target.parse(text)
    assert says in str(raised.value)


def test_settings_outside_a_sweep_and_in_other_processes() -> None:
    import pickle

    settings = Settings("adam", lr=0.5, weight_decay=0.0, seed=2)
    settings.report(1, 0.5)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValueError, match="'lion' is none of sgd, sgdw, adam, adamw"):
        Settings("lion").numpy_optimizer([])
    with pytest.raises(AttributeError):
        settings.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("optimizer", ["adamw", "sgdw"])
def test_l2_of_any_size_leaves_the_parameter(optimizer: str) -> None:
    settings = Settings(optimizer, lr=1.0, weight_decay=1.0)
    with pytest.raises(FloatingPointError, match="lr 1 and weight decay 1 would remove a whole"):
        settings.numpy_optimizer([np.ones((2, 2))])
    settings.numpy_optimizer([np.ones((2, 2))], decay_policy="l2")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "sgdw"])
@pytest.mark.parametrize(
    ("words", "removes"),
    [
        ({"decay_policy": "independent"}, 2.0),
        ({"decay_policy": "independent", "base_lr": 1.0}, 0.2),
        ({"decay_policy": "corrected", "base_lr": 0.01}, 2.0),
        ({"decay_policy": "corrected"}, 0.2),
    ],
)
def test_a_whole_parameter_is_removed_under_any_policy(
    optimizer: str, words: dict[str, Any], removes: float
) -> None:
    """The cell diverges; it is not a fault of the function."""
    settings = Settings(optimizer, lr=0.1, weight_decay=2.0)
    weight = np.ones((2, 2))
    if removes >= 1:
        with pytest.raises(FloatingPointError, match="would remove a whole parameter"):
            settings.numpy_optimizer([weight], **words)
    else:
        settings.numpy_optimizer([weight], **words).step([np.zeros((2, 2))])
        assert weight == pytest.approx(1 - removes)
