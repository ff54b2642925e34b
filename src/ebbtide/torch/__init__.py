"""The torch face: drop-in AdamW, Adam and SGD, and what goes with them."""

from ebbtide.torch.optimizers import SGD as SGD
from ebbtide.torch.optimizers import Adam as Adam
from ebbtide.torch.optimizers import AdamW as AdamW

__all__ = ["SGD", "Adam", "AdamW"]
