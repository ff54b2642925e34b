"""The torch face: drop-in AdamW, Adam and SGD, and what goes with them."""

from ebbtide.torch.callbacks import huggingface_callback as huggingface_callback
from ebbtide.torch.callbacks import lightning_callback as lightning_callback
from ebbtide.torch.checkpoint import CheckpointError as CheckpointError
from ebbtide.torch.checkpoint import load as load
from ebbtide.torch.checkpoint import save as save
from ebbtide.torch.estimate import MemoryEstimate as MemoryEstimate
from ebbtide.torch.estimate import estimate as estimate
from ebbtide.torch.explain import explain as explain
from ebbtide.torch.groups import ParamGroups as ParamGroups
from ebbtide.torch.groups import param_groups as param_groups
from ebbtide.torch.in_backward import step_in_backward as step_in_backward
from ebbtide.torch.monitor import DecayMonitor as DecayMonitor
from ebbtide.torch.monitor import decay_in_force as decay_in_force
from ebbtide.torch.optimizers import SGD as SGD
from ebbtide.torch.optimizers import Adam as Adam
from ebbtide.torch.optimizers import AdamW as AdamW
from ebbtide.torch.scales import gradient_scales as gradient_scales
from ebbtide.torch.scales import gradient_scales_of_file as gradient_scales_of_file
from ebbtide.torch.scheduler import Scheduler as Scheduler

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CheckpointError",
    "DecayMonitor",
    "MemoryEstimate",
    "ParamGroups",
    "Scheduler",
    "decay_in_force",
    "estimate",
    "explain",
    "gradient_scales",
    "gradient_scales_of_file",
    "huggingface_callback",
    "lightning_callback",
    "load",
    "param_groups",
    "save",
    "step_in_backward",
]
