"""`python cli.py {fit,validate,test,compare,export} --help`; the installed command `salt-lightning` is the same."""

from salt_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
