# Everything sets itself up in .venv: `make compare`, `make test`, `make parity`, `make check`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Idle OpenMP threads sleep instead of spinning: small steps run many times faster on a busy machine.
export OMP_WAIT_POLICY := PASSIVE

PEERS := .venv/.peers
# The last three are for the benchmark of networks alone.
DIFFUSION_PEERS := diffusers k-diffusion torchcfm flow-matching torchdiffeq einops accelerate denoising-diffusion-pytorch ema-pytorch

FLOW_PEERS := nflows normflows

# kornia has the blur of stylegan2_pytorch. torchgan's wheel also brings a package `tests`; ours comes first on the path.
GAN_PEERS := torchgan torch-mimicry stylegan2_pytorch kornia kornia-rs

.PHONY: setup compare test parity check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' || { echo "Trilemma needs Python >= 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

compare: setup  ## train a strong model of each family on the digits, print a leaderboard, write report.html
	$(BIN)/trilemma compare digits

test: setup  ## the whole test suite, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torch-fidelity sdmetrics copulas transformers tokenizers $(DIFFUSION_PEERS) $(FLOW_PEERS) $(GAN_PEERS)
	@touch $@

parity: $(PEERS)  ## against other libraries: same weights, same noise, same answer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/parity

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## measure the speed claims; results go to benchmarks/results
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info
