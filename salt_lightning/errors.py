"""The errors a user is meant to see: one line, no traceback (cli.main catches them)."""

import argparse
from typing import NoReturn


class ConfigError(ValueError):
    """A setting, a file or a combination of them is wrong.

    The message names the setting as typed, its value, what is allowed and what to do.
    """


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the last checkpoint is still good."""


class VerbParser(argparse.ArgumentParser):
    """Arguments of a verb that needs no trainer: what is wrong with them is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.split()[-1]}: {message}")
