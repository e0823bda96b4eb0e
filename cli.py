"""`python cli.py {fit,validate,test,predict,check,compare,export} --help`; the command `salt-lightning` is the same."""

try:
    from salt_lightning.cli import main
except KeyboardInterrupt:  # the imports take seconds
    raise SystemExit(130) from None
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed for this Python: `. .venv/bin/activate` (which `make demo` makes), or "
        "`pip install -e .`"
    ) from None

if __name__ == "__main__":
    raise SystemExit(main())
