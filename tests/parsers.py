"""Keeps the command's parsers: building one takes a quarter of a second, half of a small fit, and all are alike."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from jsonargparse import _subcommands

from salt_lightning import cli


def keep(verbs: Iterable[str] = (), only_the_first: bool = False) -> Callable[[], None]:
    """From now on, this process and those it forks build one parser per verb. Returns a function that ends this.

    Args:
        verbs: their parsers are built now, for processes that are to be forked.
        only_the_first: a process takes a kept parser once and then builds its own, as the command does.
    """
    build, built = cli.SALTCLI.setup_parser, {}

    def setup_parser(command: cli.SALTCLI, *args: Any, **kwargs: Any) -> None:
        key = type(command), command.verb, *map(str, args)
        if key not in built:
            before = set(vars(command))
            build(command, *args, **kwargs)
            built[key] = {name: value for name, value in vars(command).items() if name not in before}
        vars(command).update(built.pop(key) if only_the_first and is_forked else built[key])

    is_forked = False
    cli.SALTCLI.setup_parser = setup_parser
    _build(verbs)
    is_forked = True
    put_back = _list_settings_once()

    def end() -> None:
        cli.SALTCLI.setup_parser = build
        put_back()

    return end


def _build(verbs: Iterable[str]) -> None:
    class Built(Exception):
        pass

    def parse(*_: Any) -> None:
        raise Built

    original, cli.SALTCLI.parse_arguments = cli.SALTCLI.parse_arguments, parse
    for verb in verbs:
        with suppress(Built):
            cli._start(cli.SALTCLI, [verb])
    cli.SALTCLI.parse_arguments = original


def _list_settings_once() -> Callable[[], None]:
    """jsonargparse lists all settings anew to find each one of them: a tenth of a small fit."""
    name, kept = "filter_non_parsing_actions", {}
    filtered = getattr(_subcommands, name, None)  # not in every version

    def filter_once(actions: list) -> list:
        known = kept.get(id(actions))
        if known is None or known[0] != actions:
            known = kept[id(actions)] = list(actions), filtered(actions)
        return known[1]

    setattr(_subcommands, name, filter_once)
    return lambda: setattr(_subcommands, name, filtered)
