"""`python cli.py {fit,validate,test,predict,check,compare,export} --help`; the command `salt-lightning` is the same."""

import sys

from salt_lightning.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
