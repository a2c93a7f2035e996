# Everything happens in .venv, which needs only Python >= 3.10 and a network for pip.
# `make demo` runs the main use on real input, `make test` takes ten minutes on two cores, `make everything` half an hour.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
MINUTES := 4

.PHONY: demo test everything check bench figures gpu aarch64 wheels release site clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py -o $(DEMO) --minutes $(MINUTES)

PARALLEL := --numprocesses=logical --maxprocesses=8 --dist=worksteal --durations=15
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not everything" $(PYTEST)

# Adds sanitizers, AArch64, Triton's interpreter, long streams, kills, searches, browsers, README blocks and fuzzing.
everything: $(VENV)/.everything
	@if [ -d $(ARM)/python ]; then :; elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) aarch64; \
	else echo "The AArch64 tests are skipped: run make aarch64 as root to install what they need."; fi
	$(BIN)/python -m pytest tests benchmarks $(PARALLEL) $(PYTEST)
	$(BIN)/python -m tests.fuzz --seconds 60

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/python benchmarks/figures.py --check

bench: $(VENV)/.photographs
	$(BIN)/python benchmarks/attention_cpu.py
	$(BIN)/python benchmarks/model_cpu.py
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/profile_checks.py
	$(BIN)/python benchmarks/estimate.py
	$(BIN)/python benchmarks/engines_rtx.py
	$(BIN)/python benchmarks/kernels_static.py
	$(BIN)/python benchmarks/optimize.py --size 518 -o profiles/results
	$(BIN)/python benchmarks/stream.py -o profiles/results
	$(BIN)/python benchmarks/stream.py --size 224 -o profiles/results
	$(BIN)/python benchmarks/stream.py --model saliency --frames 100 -o profiles/results
	$(BIN)/python benchmarks/stream.py --int8 --compute-precision bf16 -o profiles/results
	$(BIN)/python benchmarks/stream_scenes.py $(VENV)/scenes
	for scene in square street garden; do \
	  $(BIN)/python benchmarks/stream.py --video $(VENV)/scenes/$$scene.mp4 --start 0 --frames 120 -o profiles/results || exit 1; \
	done
	$(BIN)/python benchmarks/optimize.py --seeds 10 --minutes 2.5 -o profiles/results
	$(BIN)/python -m tests.fuzz --full --kills 500 -o profiles/results/fuzz

# The documentation's tables and charts, from profiles/results.
figures: $(VENV)/.dev
	$(BIN)/python benchmarks/figures.py

# On a machine with an NVIDIA GPU, a torch for CUDA and Triton in this environment: parity, memory errors, speed.
gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu -n0
	@if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck initcheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -n0 -k sanitised || exit 1; \
	  done; \
	else echo "compute-sanitizer is not installed (CUDA toolkit): memory errors are not looked for"; fi
	$(BIN)/python benchmarks/attention_gpu.py -o profiles/results
	$(BIN)/python benchmarks/attention_gpu.py --tile 128
	$(BIN)/python benchmarks/model_gpu.py -o profiles/results

# dist/: wheels for x86-64 and AArch64 that need no compiler where they are installed.
wheels: $(VENV)/.dev
	$(BIN)/python runtime/native/wheels.py -o dist

# build/site: the documentation, with a reference from docstrings and commands.
site: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

# Build and check everything that a release consists of; nothing is published.
release: wheels
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	  grep -q "^## $$version" CHANGELOG.md || { echo "CHANGELOG.md has no heading for version $$version"; exit 2; }
	$(BIN)/python -m build --sdist --outdir dist
	$(BIN)/python -m twine check --strict dist/sparsifiner_edge-*

# For tests and wheels on AArch64: cross compiler, emulator, Highway and a Python unpacked here. Root on Debian or Ubuntu.
ARM := $(CURDIR)/$(VENV)/aarch64
APT_ARM := apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::Lists=$(ARM)/lists
aarch64: $(VENV)/.dev
	apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user
	mkdir -p $(ARM)/lists/partial
	$(APT_ARM) update
	cd $(ARM) && $(APT_ARM) -o APT::Sandbox::User=root download libhwy-dev libhwy1t64
	cd $(ARM) && for package in *.deb; do dpkg -x $$package .; done
	mkdir -p $(ARM)/debs/partial $(ARM)/python/usr/lib && ln -sfn usr/lib $(ARM)/python/lib
	$(APT_ARM) -o Dir::State::status=/dev/null -o Dir::Cache::archives=$(ARM)/debs -o APT::Sandbox::User=root \
	  --download-only --no-install-recommends -y install python3 libstdc++6
	for package in $(ARM)/debs/*.deb; do dpkg -x $$package $(ARM)/python; done

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo "Python lacks the module venv: install it (Debian, Ubuntu: sudo apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Build dependencies of the native kernels. The package also works without them, only slower.
$(VENV)/.native: | $(VENV)/bin/python
	@if [ -e /usr/include/hwy/highway.h ] && [ -e /usr/include/onnxruntime/onnxruntime_cxx_api.h ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -o DPkg::Lock::Timeout=300 -y -qq g++ libhwy-dev libonnxruntime-dev; \
	else \
	  echo "The native kernels are not built, and models run slower. To build them (Debian, Ubuntu), run this and then make again:"; \
	  echo "  sudo apt-get install g++ libhwy-dev libonnxruntime-dev && make clean"; \
	fi
	@touch $@

# If the package index serves CUDA builds of torch, this downloads some gigabytes once.
$(VENV)/.demo: pyproject.toml $(VENV)/.native | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.native | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The oldest runtime that exported files must load in; a test runs them there.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/onnxruntime-1.21 'onnxruntime==1.21.*'
	# Triton server's definition of a model configuration; a test parses ours with it.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/tritonclient 'tritonclient>=2.40'
	# The base install without kernels; tests import everything there that must not need more.
	$(PYTHON) -m venv $(VENV)/bare
	$(VENV)/bare/bin/python -m pip install --quiet --editable . --config-settings=wheel.cmake=false
	@touch $@ $(VENV)/.demo

# Photographs for published figures and for training (sparsifiner_edge/demo/split.py), from Debian's packages.
# They are installed one by one, because other distributions lack some.
PHOTOGRAPHS := opencv-doc budgie-backgrounds gnome-backgrounds lomiri-wallpapers-16.04 \
  lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers ukui-wallpapers
$(VENV)/.photographs: $(VENV)/.dev
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq; \
	  for package in $(PHOTOGRAPHS); do \
	    DEBIAN_FRONTEND=noninteractive apt-get install -o DPkg::Lock::Timeout=300 -y -qq --no-install-recommends $$package \
	      || echo "$$package cannot be installed here: what needs it is left out."; \
	  done; \
	else \
	  echo "For photographs that benchmarks and tests need (Debian, Ubuntu): sudo apt-get install $(PHOTOGRAPHS)"; \
	fi
	@touch $@

# Packages for the long tests: a browser, fonts, GStreamer with an RTSP server, network namespaces. Tests that miss them
# skip and say so. (The loader of Python plugins opens libpython3.x.so, which only libpython3-dev has.)
ADDED := chromium fonts-noto-cjk iproute2 python3-gi python3-venv gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 \
  gir1.2-gst-plugins-bad-1.0 gstreamer1.0-python3-plugin-loader libpython3-dev \
  gstreamer1.0-tools gstreamer1.0-rtsp gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad \
  gstreamer1.0-plugins-ugly
$(VENV)/.everything: $(VENV)/.photographs
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -o DPkg::Lock::Timeout=300 -y -qq --no-install-recommends $(ADDED); \
	else \
	  echo "For the tests of pages and streams (Debian, Ubuntu): sudo apt-get install $(ADDED)"; \
	fi
	# GStreamer's Python loader embeds the system's Python: tests of our element need it with what a bundle needs to run.
	{ /usr/bin/python3 -m venv --system-site-packages $(VENV)/gstreamer && \
	  $(VENV)/gstreamer/bin/python -m pip install --quiet click cryptography msgspec numpy onnx onnxruntime pillow rich; } \
	  || echo "The system has no Python with venv: tests of the GStreamer element are left out."
	# The assembler of CUDA 12.6, as in JetPack 6: it allocates registers differently from Triton's.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/cuda-12.6 'nvidia-cuda-nvcc-cu12==12.6.*' \
	  || echo "CUDA 12.6's assembler cannot be installed: its tests are left out."
	@touch $@
