"""The command `salt-lightning`, and `python cli.py`: what can go wrong before salt_lightning.cli is there to say it."""


def main() -> int:
    """Runs the command line of this process; returns its exit code, that of cli.main."""
    try:
        from salt_lightning.cli import main as run
    except KeyboardInterrupt:  # the imports take seconds
        return 130
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"error: {missing.name} is not installed for this Python: `. .venv/bin/activate` (which `make demo` "
            "makes), or `pip install -e .`"
        ) from None
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
