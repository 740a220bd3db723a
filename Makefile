# Two commands matter, and each does its own set-up on a machine with Python 3.10+ and make:
#   make demo    the main job: compare solvers on the embedded models and write the report
#   make test    the tests
# docs/development.md says why each has its own environment and why the package is installed anew on every run.

PYTHON   ?= python3
# Handed to every `pip install`, for example an index that holds another build of torch.
PIP_ARGS ?=
# Handed to `fewstep eval` and to pytest, for example: make test ARGS="tests/samplers -k unipc"
ARGS     ?=
# Parallel pytest workers. Each computes on one thread, or they would fight for the cores.
WORKERS  ?= 2
# Versions of diffusers for `make matrix`.
VERSIONS ?= 0.35 0.37 0.40

DEMO := .venv-demo
TEST := .venv-test

.DEFAULT_GOAL := help
.PHONY: help demo test matrix lint format types wheel clean FORCE

help:
	@echo "make demo     run the main job: solvers x NFE on the embedded models, and a report"
	@echo "make test     run the tests (some of them: make test ARGS='tests/samplers -k unipc')"
	@echo "make matrix   run the tests of the diffusers scheduler with every version of diffusers that is supported"
	@echo "make lint     check rules and formatting with ruff; make format applies them"
	@echo "make types    check the types of the library and its tests with pyright"
	@echo "make wheel    build the source archive and the wheel into dist/"
	@echo "make clean    remove environments, builds and caches"

# $(call python_in,ENVIRONMENT)
python_in = $(1)/bin/python

# $(call pip_in,ENVIRONMENT): -qq keeps pip's errors. --no-compile leaves bytecode to the first import: most modules of the
# large packages are never imported, and compiling all of them takes longer than everything else.
pip_in = $(call python_in,$(1)) -m pip install -qq --no-compile --disable-pip-version-check

# $(call make_environment,ENVIRONMENT,EXTRAS): a new environment with torch first, at the version of the constraint file,
# because a bare `torch` asked for by another package takes the newest build there is.
define make_environment
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "fewstep needs Python 3.10 or newer, $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 ..." % v[:2])'
	@echo "Setting up $(1): once, a few minutes, silent while PyTorch is downloaded"
	$(PYTHON) -m venv --clear $(1)
	$(call pip_in,$(1)) -c constraints.txt $(PIP_ARGS) torch numpy setuptools
	$(call pip_in,$(1)) -c constraints.txt $(PIP_ARGS) ".[$(2)]"
	@pwd > $(1)/.installed
endef

# $(call install_package,ENVIRONMENT): the working tree as a user would get it. `build` is removed because setuptools
# would pack files from it that the tree no longer has.
define install_package
	@rm -rf build
	@$(call pip_in,$(1)) --no-deps --no-build-isolation --force-reinstall .
	@rm -rf build fewstep.egg-info
endef

# $(call moved,ENVIRONMENT): FORCE when the environment was made for another folder; one does not survive a move.
here := $(shell pwd)
moved = $(if $(wildcard $(1)/.installed),$(if $(filter-out x$(subst $() ,_,$(here)),x$(subst $() ,_,$(shell cat $(1)/.installed))),FORCE))

demo: $(DEMO)/.installed
	$(call install_package,$(DEMO))
	$(DEMO)/bin/fewstep eval $(ARGS)

test: $(TEST)/.installed
	$(call install_package,$(TEST))
	OMP_NUM_THREADS=1 $(call python_in,$(TEST)) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# transformers 5 came between 0.37 and 0.40. The newest diffusers is in `make test`.
matrix: $(VERSIONS:%=.venv-diffusers-%/.installed)
	for version in $(VERSIONS); do \
	  $(pip_in_diffusers) --no-deps --no-build-isolation --force-reinstall . && rm -rf build fewstep.egg-info && \
	  OMP_NUM_THREADS=1 .venv-diffusers-$$version/bin/python -m pytest -q $(ARGS) tests/hosts/test_diffusers_*.py || exit 1; \
	done

pip_in_diffusers = .venv-diffusers-$$version/bin/python -m pip install -qq --no-compile --disable-pip-version-check

.venv-diffusers-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-diffusers-$*
	grep -E '^torch==' constraints.txt | xargs .venv-diffusers-$*/bin/python -m pip install -qq --no-compile $(PIP_ARGS) setuptools
	.venv-diffusers-$*/bin/python -m pip install -qq --no-compile $(PIP_ARGS) "diffusers==$*.*" numpy scipy pytest \
	  "transformers$(if $(filter 0.35 0.37,$*),<5,>=5)" accelerate safetensors pillow
	@touch $@

lint: $(TEST)/.installed
	$(call python_in,$(TEST)) -m ruff check .
	$(call python_in,$(TEST)) -m ruff format --check .

format: $(TEST)/.installed
	$(call python_in,$(TEST)) -m ruff check --fix .
	$(call python_in,$(TEST)) -m ruff format .

types: $(TEST)/.installed
	$(call install_package,$(TEST))
	$(call python_in,$(TEST)) -m pyright --pythonpath $(call python_in,$(TEST))

# The wheel is built from the source archive, so a file missing there is noticed here.
wheel: $(TEST)/.installed
	rm -rf build dist fewstep.egg-info
	$(call python_in,$(TEST)) -m build --no-isolation --outdir dist .
	rm -rf build fewstep.egg-info

clean:
	rm -rf $(DEMO) $(TEST) .venv-diffusers-* build dist fewstep.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is complete when its stamp is in it. When pyproject.toml or the constraints change it is made anew, not
# mended: nothing old stays in it.
comma := ,
$(DEMO)/.installed: pyproject.toml constraints.txt $(call moved,$(DEMO))
	$(call make_environment,$(DEMO),eval$(comma)diffusers)

$(TEST)/.installed: pyproject.toml constraints.txt $(call moved,$(TEST))
	$(call make_environment,$(TEST),dev)

FORCE:
