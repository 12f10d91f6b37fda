# Every target sets up what it needs in .venv first. PYTHON is any Python 3.9+.
PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test test-slow test-device bench check lock clean

demo: $(READY) ## run the main job: ten devices, three corrupted, one report
	@.venv/bin/covey demo $(ARGS)

test: $(READY) ## the everyday tests
	@.venv/bin/python scripts/run_tests.py $(ARGS)

test-slow: $(READY) ## everything but emulated machines, also what takes long
	.venv/bin/python -m pytest -m "not device" $(ARGS)

test-device: $(READY) ## a whole emulated machine, from the card to two rounds; slow
	.venv/bin/python -m pytest -m device -s tests/device $(ARGS)

bench: $(READY) ## side-by-side measurements
	.venv/bin/python benchmarks/aggregation.py
	.venv/bin/python benchmarks/agent.py
	.venv/bin/python benchmarks/train_step.py --quick

check: $(READY) ## format, lint, types, import contracts, tests
	./check

$(READY): locks/dev.txt locks/uv.txt scripts/bootstrap.py $(wildcard */pyproject.toml)
	@$(PYTHON) scripts/bootstrap.py

lock: $(READY) ## compile locks/*.txt anew: names, versions and hashes, never an address
	@.venv/bin/python scripts/lock.py

clean:
	rm -rf .venv .bootstrap .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
