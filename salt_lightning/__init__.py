"""SALT pretraining in Lightning: a small frozen teacher helps a larger student, then leaves (arXiv 2410.18779)."""

from salt_lightning.answers import AnswerTest
from salt_lightning.data import SALTDataModule
from salt_lightning.examples import Examples
from salt_lightning.module import SALTModule
from salt_lightning.optim import OptimSpec
from salt_lightning.schedule import KDScheduleCallback
from salt_lightning.spec import ModelSpec

__all__ = ["AnswerTest", "Examples", "KDScheduleCallback", "ModelSpec", "OptimSpec", "SALTDataModule", "SALTModule"]
