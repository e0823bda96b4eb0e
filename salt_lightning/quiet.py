"""Keeps out of the terminal what the libraries say and no user could act on."""

import logging
import warnings

_CHATTER = (
    "Restoring states",
    "Restored all states",
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Seed set to",
)


def silence_libraries() -> None:
    """Keeps out what is not about this run: advertising, and deprecations inside the libraries."""
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)  # lightning with torch 2.13
    warnings.filterwarnings("ignore", ".*Total length of `Loader` across ranks is zero.*")  # all rows are scored
    # not so here: the first and the last step are always logged
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each retry without a network
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_about_the_run)


def _is_about_the_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)
