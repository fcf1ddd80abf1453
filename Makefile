# Two commands matter: `make book` builds the site, `make test` runs every test.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := book,browser,course,onnx,sweep,slurm,test
CHAPTERS := $(sort $(wildcard chapters/[0-9]*.ipynb))
# The number of the student whom `make assignments` is for.
SEED ?= 0
# Byte-compiled libraries import three times as fast in every kernel.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: book pdf test assignments lint refresh clean
.DELETE_ON_ERROR:

book: .venv/installed
	@echo "== Executing the chapters at the quick profile"
	$(BIN)/fishlib run $(CHAPTERS)
	@echo "== Rendering the site"
	$(BIN)/fishlib render
	@echo "== The book: $(CURDIR)/_build/html/index.html"

pdf: book
	@echo "== Printing the site by Chromium"
	$(BIN)/fishlib pdf

test: .venv/installed
	@echo "== Code style"
	$(BIN)/ruff check .
	@echo "== Tests: library, chapters, site"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --junitxml _build/tests.xml
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --nbval-lax $(CHAPTERS)
	@echo "== The results of the tests: $(CURDIR)/_build/tests.xml"

assignments: .venv/installed
	@echo "== Student versions, solutions and archives of the autograder; the solutions are graded first"
	OMP_NUM_THREADS=1 $(BIN)/fishlib assign --seed $(SEED)
	@echo "== The assignments: $(CURDIR)/_build/assignments"

lint: .venv/installed
	$(BIN)/ruff check .

refresh: .venv/installed
	$(BIN)/fishlib refresh $(CHAPTERS)

.venv/installed: pyproject.toml constraints.txt
	@echo "== Installing into .venv (several gigabytes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	$(BIN)/python -m fishlib.rerun.assets
	@touch $@

clean:
	rm -rf _build
