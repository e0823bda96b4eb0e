# `make demo` and `make test`: each alone, on a fresh machine with Python 3.11 or newer, installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
DEMO := runs/demo/seed$(SEED)
GPU_TESTS := tests/test_losses.py tests/test_triton_rows.py tests/test_attention.py
# One process owns the machine; the tokenizer's own threads would fight the workers.
export TOKENIZERS_PARALLELISM := false
# Bytecode is compiled and kept when a module is first imported: compiling all of it takes half of the install.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-ds test check style types pytest gpu-tests
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -e '.[dev]'
	touch $@

cache/demo/corpus.jsonl: configs/demo/corpus.py | .venv/installed
	$(BIN)/python $< $@

demo: .venv/installed cache/demo/corpus.jsonl
	@$(BIN)/python -c 'import fcntl, glob; [fcntl.lockf(open(f, "a"), fcntl.LOCK_EX | fcntl.LOCK_NB) for f in glob.glob("$(DEMO)/*/.lock")]' 2>/dev/null \
		|| { echo "error: $(DEMO) is in use by another make demo; wait until it ends, or set another SEED"; exit 1; }
	rm -rf $(DEMO)
	@for run in teacher baseline salt rkd; do \
		echo "--- $$run"; \
		split=; [ $$run = teacher ] || split="--data.difficulty $(DEMO)/teacher"; \
		teacher=; [ $$run = teacher ] || [ $$run = baseline ] || teacher="--model.teacher.path $(DEMO)/teacher/checkpoints/step-00000300.ckpt"; \
		$(BIN)/python cli.py fit --config configs/demo/$$run.yaml --seed_everything $(SEED) --run $(DEMO)/$$run $$teacher $$split || exit 1; \
		[ $$run != teacher ] || $(BIN)/python cli.py validate --config configs/demo/teacher.yaml --run $(DEMO)/teacher --ckpt_path last || exit 1; \
	done
	$(BIN)/python cli.py compare $(DEMO)/baseline $(DEMO)/salt $(DEMO)/rkd $(DEMO)/teacher --out $(DEMO)
	@echo "TensorBoard: $(BIN)/tensorboard --logdir runs"

$(DEMO)/compare.json:
	$(MAKE) demo

demo-ds: .venv/installed $(DEMO)/compare.json
	rm -rf $(DEMO)/score $(DEMO)/salt_ds
	$(BIN)/python cli.py predict --config configs/demo/score.yaml --run $(DEMO)/score --model.teacher.path $(DEMO)/teacher/checkpoints/step-00000150.ckpt
	$(BIN)/python cli.py fit --config configs/demo/salt_ds.yaml --seed_everything $(SEED) --run $(DEMO)/salt_ds \
		--data.difficulty $(DEMO)/teacher --data.selection $(DEMO)/score --model.teacher.path $(DEMO)/teacher/checkpoints/step-00000300.ckpt
	$(BIN)/python cli.py compare $(DEMO)/baseline $(DEMO)/salt $(DEMO)/salt_ds $(DEMO)/rkd $(DEMO)/teacher --out $(DEMO)

check: style types

style: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

# mypy takes a minute on one core, and tests often wait: hence three of their processes for two cores
test: style
	$(MAKE) -j 2 types gpu-tests pytest

pytest: .venv/installed
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

gpu-tests: types
	$(BIN)/python -m pytest -q -W default -m gpu $(GPU_TESTS)
