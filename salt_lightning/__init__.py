"""SALT pretraining in Lightning: a small frozen teacher helps a larger student, then leaves (arXiv 2410.18779)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salt_lightning.answers import AnswerTest
    from salt_lightning.data import SALTDataModule
    from salt_lightning.fit.optim import OptimSpec
    from salt_lightning.hugging_face.spec import ModelSpec
    from salt_lightning.losses import salt_loss, token_stats
    from salt_lightning.module import SALTModule
    from salt_lightning.schedule import KDSchedule, KDScheduleCallback
    from salt_lightning.text.examples import Examples

__version__ = "0.1.0"

__all__ = [
    "AnswerTest",
    "Examples",
    "KDSchedule",
    "KDScheduleCallback",
    "ModelSpec",
    "OptimSpec",
    "SALTDataModule",
    "SALTModule",
    "salt_loss",
    "token_stats",
]

_HOMES = {
    "AnswerTest": "answers",
    "Examples": "text.examples",
    "KDSchedule": "schedule",
    "KDScheduleCallback": "schedule",
    "ModelSpec": "hugging_face.spec",
    "OptimSpec": "fit.optim",
    "SALTDataModule": "data",
    "SALTModule": "module",
    "salt_loss": "losses",
    "token_stats": "losses",
}


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a name on first use, so that the command can print before torch and Lightning are imported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"salt_lightning.{_HOMES[name]}"), name)
