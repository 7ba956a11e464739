# Sets up .venv and calls Python. Options go behind ARGS: make demo ARGS="--seed 5 --out out/seed5"
# Without make, or on Windows, type the Python lines yourself (README.md).

ARGS :=
PYTHON3 := python3
PYTHON := .venv/bin/python
TEXT := README.md
RUFF := ruff==0.17.6

# `make demo SEED=5` must not train with another seed in silence.
NAMES := OUT DATA LANGUAGES SEED PROCESSES WITHOUT VOCABULARY TEXTS DICTIONARY SHARE
NAMES += SEEDS GROUPS VARIANTS
ifneq (,$(strip $(foreach name,$(NAMES),$(filter command,$(firstword $(origin $(name)))))))
$(error options go behind ARGS: make demo ARGS="--seed 5"; ARGS=--help shows them)
endif

.PHONY: help demo ablation test lint bench gpu clean

help:
	@echo 'make demo      train and measure the demo, 11 to 35 minutes on two cores'
	@echo 'make ablation  the demo with one thing changed, 12 runs: hours'
	@echo 'make test      all tests'
	@echo 'make lint      formatter and linter'
	@echo 'make bench     speed of the kernels and of the tokenizer'
	@echo 'make gpu       on a GPU: tests, speed, a profile of training'
	@echo 'make clean     remove out/, with all that was trained, and caches'
	@echo 'ARGS="..." hands options to demo and ablation; ARGS=--help shows them'

OLD = Python %d.%d is too old; install 3.10 or newer, then: make PYTHON3=python3.12
.venv/installed: requirements.txt
	@$(PYTHON3) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and "$(OLD)" % v)'
	test -d .venv || $(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/installed
	@$(PYTHON) -m demo $(ARGS)

ablation: .venv/installed
	@$(PYTHON) -m demo.ablation $(ARGS)

# Two processes of one thread each: the kernels in Triton's interpreter and the demo's words take
# about as long as all other tests. The report on the others is printed last.
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	@report=$$(mktemp); \
	$(PYTHON) -m pytest -q tests --ignore-glob='*test_kernels_*' --ignore-glob='*test_demo_words*' \
		> $$report 2>&1 & others=$$!; \
	$(PYTHON) -m pytest -q tests/test_kernels_*.py tests/test_demo_words.py; first=$$?; \
	wait $$others; others=$$?; cat $$report; rm $$report; exit $$((first + others))

lint: .venv/installed
	@test -e .venv/bin/ruff || $(PYTHON) -m pip install --quiet --disable-pip-version-check $(RUFF)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

bench: .venv/installed
	$(PYTHON) -m kernels.bench
	$(PYTHON) tokenizer.py bench $(TEXT) --vocab-size 400

gpu: .venv/installed
	$(PYTHON) -m kernels.bench --json out/gpu/bench.json
	$(PYTHON) -m demo.write -o out/gpu/data --images 500 --documents 500
	$(PYTHON) tokenizer.py train out/gpu/data/text/en.txt --vocab-size 600 -o out/gpu/en.model
	$(PYTHON) tokenizer.py merge out/gpu/en.model -o out/gpu/tokenizer.model
	$(PYTHON) -m kernels.bench --profile vision --preset tiny --tokenizer out/gpu/tokenizer.model \
		--data out/gpu/data/phrases.json --batch-size 32 --steps 100 -o out/gpu/vision

clean:
	rm -rf out .pytest_cache .ruff_cache __pycache__ */__pycache__ */*/__pycache__
