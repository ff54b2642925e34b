"""Whole uses: the Hugging Face Trainer and Lightning train with ours as with torch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebbtide.torch import AdamW
from tests.tolerances import TRAINING_FLOAT32

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # of the trainers' own


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.sum()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.last(self.norm(torch.tanh(self.first(x)))).squeeze(-1)
        return {"loss": (out - labels).square().mean(), "logits": out}


def trainer(folder: Path, kind: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        save_steps=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model=Model(),
        args=arguments,
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(kind, options),
    )


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach() for param in model.parameters()]


def test_hugging_face_trainer_saves_and_resumes(tmp_path: Path) -> None:
    ours, theirs = trainer(tmp_path / "a", AdamW), trainer(tmp_path / "b", torch.optim.AdamW)
    ours.train()
    theirs.train()
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), **TRAINING_FLOAT32)
    groups = [(g["weight_decay"], len(g["params"])) for g in ours.optimizer.param_groups]
    assert groups == [(0.1, 2), (0.0, 4)]
    resumed = trainer(tmp_path / "a", AdamW)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert all(map(torch.equal, weights(resumed.model), weights(ours.model)))
    switched = trainer(tmp_path / "b", AdamW)  # from torch's optimizer to ours in mid-training
    switched.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-16"))
    torch.testing.assert_close(weights(switched.model), weights(theirs.model), **TRAINING_FLOAT32)


def fit(
    folder: Path, kind: Any, precision: str = "32-true", clip: Any = 0.5, **options: Any
) -> Any:
    import lightning
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.net.first.parameters(), "name": "first"},
                {"params": self.net.last.parameters(), "name": "last", "weight_decay": 0.0},
            ]
            optimizer = kind(groups, lr=1e-2, **options)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=25)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    torch.manual_seed(0)
    module = Module()
    lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision=precision,
        gradient_clip_val=clip,
        callbacks=[LearningRateMonitor(log_momentum=True, log_weight_decay=True)],
        logger=CSVLogger(str(folder)),
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(module, torch.utils.data.DataLoader(Rows(), batch_size=8))
    return module


def test_lightning_clips_schedules_and_monitors(tmp_path: Path) -> None:
    ours, theirs = fit(tmp_path / "a", AdamW), fit(tmp_path / "b", torch.optim.AdamW)
    torch.testing.assert_close(weights(ours), weights(theirs), **TRAINING_FLOAT32)
    (metrics,) = (tmp_path / "a").rglob("metrics.csv")
    columns = metrics.read_text().splitlines()[0].split(",")
    assert {"lr-AdamW/first", "lr-AdamW/last", "lr-AdamW/last-weight_decay"} <= set(columns)


@pytest.mark.parametrize("fused", [None, True])
def test_lightning_with_mixed_precision_and_clipping_inside_the_step(
    tmp_path: Path, fused: bool | None
) -> None:
    module = fit(tmp_path, AdamW, "bf16-mixed", clip=None, fused=fused, clip_grad_norm=0.5)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(module))
