"""Writes the demo's corpus: the source of Python's standard library, which is on every machine, without its tests.

Each file is one document. SALTDataModule later splits off documents for validation.
"""

import json
import sys
import sysconfig
from pathlib import Path

SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def main(target: Path) -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    target.parent.mkdir(parents=True, exist_ok=True)
    count = size = 0
    with open(target, "w", encoding="utf-8") as out:
        for path in sorted(stdlib.rglob("*.py")):
            if SKIP & set(path.relative_to(stdlib).parts):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                out.write(json.dumps({"text": text, "file": str(path.relative_to(stdlib))}) + "\n")
                count, size = count + 1, size + len(text)
    print(f"{target}: {count} files, {size / 1e6:.1f} M characters of the standard library")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
