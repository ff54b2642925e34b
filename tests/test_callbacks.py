"""The monitor's callbacks inside Hugging Face's Trainer and Lightning's, the real ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ebbtide.torch import AdamW, huggingface_callback, lightning_callback

with warnings.catch_warnings(action="ignore"):  # of what they import themselves
    import lightning.pytorch as pl
    import transformers

# Both warn of the machine: of few processors, of no GPU.
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """What Trainer wants of a model: a dictionary with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}


DATA = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(16)]


def trainer(folder: Path, callback: Any, **options: Any) -> transformers.Trainer:
    settings = {"logging_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
        **options.pop("arguments", {}),
    )
    return transformers.Trainer(
        Net(), arguments, train_dataset=DATA, callbacks=[callback], **options
    )


def test_trainer_overrides_the_weight_decay_and_the_callback_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    callback = huggingface_callback(every=2, say=lines.append)
    options = {"weight_decay": 0.3, "lr": 0.01}
    training = trainer(
        tmp_path,
        callback,
        optimizer_cls_and_kwargs=(AdamW, options),
        arguments={"weight_decay": 0.1, "lr_scheduler_type": "constant"},
    )
    training.train()
    assert lines == [
        "group0 (1 tensors, 8 numbers): lr 0.01, weight_decay 0.1 (decoupled) removes 0.001 of a "
        "parameter in a step, timescale 1,000 steps",
        "group1 (1 tensors, 2 numbers): lr 0.01, no weight decay",
        "weight_decay=0.3 was the optimizer's argument or default; no group uses it",
        "TrainingArguments.weight_decay is 0.1",
    ]
    logged = [row for row in training.state.log_history if "decay/group0/share" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert logged[0]["decay/group0/weight_decay"] == 0.1
    assert logged[-1]["decay/group0/realised_to_expected"] == pytest.approx(1, rel=0.01)
    assert callback.monitor.steps == 6


def test_trainers_default_decays_nothing_and_the_callback_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    seen: list[tuple[int, float]] = []
    callback = huggingface_callback(
        every=3, say=lines.append, log=lambda values, step: seen.append((step, len(values)))
    )
    trainer(tmp_path, callback).train()
    assert "no group decays anything" in lines
    assert "TrainingArguments.weight_decay is 0" in lines
    assert [step for step, _ in seen] == [1, 4]


def test_in_front_of_the_others_the_values_reach_them(tmp_path: Path) -> None:
    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    seen: list[dict[str, float]] = []
    callback = huggingface_callback(every=2, say=lambda _: None)
    training = trainer(tmp_path, Reporter())
    training.callback_handler.callbacks.insert(0, callback)
    training.train()
    assert "decay/group0/update_to_weight" in seen[0]


def test_an_optimizer_that_is_not_known_is_said_and_left_alone(tmp_path: Path) -> None:
    lines: list[str] = []
    callback = huggingface_callback(say=lines.append)
    training = trainer(
        tmp_path, callback, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1})
    )
    training.train()
    assert len(lines) == 1
    assert lines[0].endswith("not Adagrad; nothing is monitored")
    assert training.state.global_step == 6


class Module(pl.LightningModule):
    def __init__(self, several: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(1 + several))
        self.automatic_optimization = not several

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor | None:
        loss = sum(layer(batch).square().mean() for layer in self.layers)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [AdamW(layer.parameters(), lr=0.01, weight_decay=0.1) for layer in self.layers]


class Recorder(pl.loggers.logger.Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step or 0), metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("several", [False, True])
def test_lightning(tmp_path: Path, several: bool) -> None:
    lines: list[str] = []
    logger = Recorder()
    callback = lightning_callback(every=2, say=lines.append)
    training = pl.Trainer(
        max_steps=4 * (1 + several),  # Lightning counts the steps of each optimizer
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    training.fit(Module(several), torch.utils.data.DataLoader(torch.randn(12, 3), batch_size=3))
    prefixes = ["optimizer0/", "optimizer1/"] if several else [""]
    assert lines == [
        prefix + "group0 (2 tensors, 12 numbers): lr 0.01, weight_decay 0.1 (decoupled) removes "
        "0.001 of a parameter in a step, timescale 1,000 steps"
        for prefix in prefixes
    ]
    for prefix, monitor in zip(prefixes, callback.monitors, strict=True):
        key = f"{prefix}decay/group0/realised_to_expected"
        values = [metrics[key] for _, metrics in logger.rows if key in metrics]
        assert values == pytest.approx([1, 1], rel=0.01)
        assert monitor.steps == 4


def test_other_processes_than_the_first_say_nothing() -> None:
    lines: list[str] = []
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    on_lightning = lightning_callback(say=lines.append)
    on_lightning.on_train_start(
        SimpleNamespace(optimizers=[optimizer], is_global_zero=False, loggers=[]), None
    )
    on_trainer = huggingface_callback(say=lines.append)
    state = SimpleNamespace(is_world_process_zero=False, global_step=7)
    on_trainer.on_train_begin(SimpleNamespace(weight_decay=0.1), state, None, optimizer=optimizer)
    assert lines == []
    assert on_trainer.monitor.steps == 7
    on_lightning.on_train_end(None, None)
    on_trainer.on_train_end(None, None, None)


def test_neither_library_is_loaded_before_it_is_asked_for_and_named_where_it_is_missing() -> None:
    code = (
        "import sys; import ebbtide.torch as t\n"
        "print({'transformers', 'lightning', 'pytorch_lightning'} & {*sys.modules})\n"
        "for name in ('transformers', 'lightning', 'lightning.pytorch', 'pytorch_lightning'):\n"
        "    sys.modules[name] = None\n"
        "for make in (t.huggingface_callback, t.lightning_callback):\n"
        "    try: make()\n"
        "    except ImportError as error: print(error.name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == ["set()", "transformers", "pytorch_lightning"], run.stderr
