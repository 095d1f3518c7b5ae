PYTHON ?= python3
VENV := .venv
PINS := $(shell cat constraints.txt pyproject.toml setup.py | sha256sum | cut -c1-16)
STAMP := $(VENV)/.pins-$(PINS)
RUN := $(VENV)/bin/python
PEERS := kernels trl-1.12 trl-1.16
HOSTS := axolotl gpu llamafactory ms-swift trl-1.16

.PHONY: help venv venv-peers venv-oldest venv-cuda demo demo-online test test-all test-ranks test-hosts test-oldest test-cuda lint bench claims help-pages docs clean

help:
	@echo 'make demo      align a small model from thumbs up and down (no download of models, about 2 minutes)'
	@echo 'make demo-online  offline BCO against online UNA on the same task, three seeds'
	@echo 'make test      the tests (under 4 minutes on two cores)'
	@echo 'make test-all  the tests with each matmul of the CPU, and the long proofs'
	@echo 'make test-ranks  several processes under torchrun, accelerate, DeepSpeed and Ray'
	@echo 'make test-oldest  the operator, models, packing, trainer, references and all compiled kernels with the oldest versions that are allowed (7.5 GB)'
	@echo 'make test-cuda  the same with the versions of a GPU machine; no GPU needed (5 GB)'
	@echo 'make lint      ruff'
	@echo 'make bench     the figures of the README on this machine, into benchmarks/results/'
	@echo 'make bench-peers  the same against TRL and the rest, growth, long context and the charts (about two hours)'
	@echo 'make claims    what the papers claim, on a small model and, with FEEDBACK=file, on real text: docs/claims.md (under 30 minutes)'
	@echo 'make docs      the documentation site, into build/site'
	@echo 'make test-hosts  bco_fast inside axolotl, LLaMA-Factory, ms-swift and TRL, and with Liger and the Hub, an environment each (15 GB)'
	@echo 'make venv-peers  environments of two versions of TRL and of other heads, to record golden values and to measure against (1.7 GB each)'

venv: $(STAMP)

# Made once, and again only when the pins change. torch goes first and by itself: an extra that asked for it
# unpinned would bring gigabytes of CUDA along.
$(STAMP):
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.pins-*
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,data,bench,test]'
	@touch $@

venv-peers: $(PEERS:%=.venv-peers-%/.made)

# One environment per file of tests/peers/, none of it ever in $(VENV). torch first, as above.
.venv-peers-%/.made: tests/peers/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(if $(filter llamafactory,$*),$(WITHOUT_CUDA))
	@touch $@

# LLaMA-Factory imports torchaudio, whose wheels hold libraries for CUDA's torch only; its Python code does without them.
# torchvision does not, and is not imported.
WITHOUT_CUDA = rm -f $(@D)/lib/python3*/site-packages/torchaudio/lib/*.so && $(@D)/bin/python -m pip uninstall --quiet --yes torchvision

demo: venv
	$(VENV)/bin/bco-fast demo --output_dir runs/demo

demo-online: venv
	for seed in 0 1 2; do $(VENV)/bin/bco-fast demo --online --seed $$seed --output_dir runs/demo-online-$$seed || exit 1; done

# One worker a core with one thread each: most tests are too small to keep two threads busy. A GPU is hidden: these tests give Triton
# tensors of the CPU, in its interpreter; `pytest -m gpu` is for a GPU.
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

test: venv
	$(PYTEST)

# Once with each of the CPU's matmuls, whatever the processor; the long proofs with the processor's own.
test-all: venv
	BCO_FAST_CPU_MATMUL=mkl $(PYTEST)
	BCO_FAST_CPU_MATMUL=onednn $(PYTEST)
	$(PYTEST) -m 'slow and not gpu'

# One process at a time: each test starts up to four.
test-ranks: .venv-peers-ranks/.made
	OMP_NUM_THREADS=1 .venv-peers-ranks/bin/python -m pytest -n 0 -m slow tests/training/test_ranks_launched.py tests/training/test_ranks_ray.py tests/training/test_small_optimizers.py

test-hosts: venv $(HOSTS:%=.venv-peers-%/.made)
	OMP_NUM_THREADS=1 .venv-peers-gpu/bin/python -m pytest -n 0 -m '' tests/integrations/test_hub.py tests/models/test_liger.py tests/models/test_flash_attention.py
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 0 -m '' tests/integrations

venv-oldest venv-cuda: venv-%: .venv-%/.made

.venv-oldest/.made .venv-cuda/.made: .venv-%/.made: tests/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# What depends on the versions, each folder in its own process: models of transformers 4 leave traces in others' runs.
# Of the tests left out, one uses save_strategy=best, which is refused there, and three multiply bf16 on the meta device into
# float32, which PyTorch 2.11 cannot; the families of tests/models/ are newer than transformers 4.
VERSIONED = tests/head tests/models/test_parameters.py tests/data/test_packing.py tests/training/test_trainer.py tests/reference/test_fill.py tests/reference/test_identity.py
NO_META_MM = not test_compile_only and not test_the_torch_backend and not stays_within_the_promise and not never_rounded
LEFT_OUT = $(NO_META_MM) and not best_checkpoint
test-oldest test-cuda: test-%: venv-%
	for tests in $(VERSIONED); do CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n 2 --dist worksteal $$tests -k '$(if $(filter oldest,$*),$(LEFT_OUT),$(NO_META_MM))' || exit 1; done
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n 2 --dist worksteal tests/head/test_compile_only.py -m ''

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: venv
	$(RUN) benchmarks/head_cpu.py
	$(RUN) benchmarks/head_sparse.py
	$(RUN) benchmarks/demo.py
	$(RUN) benchmarks/train_step.py

# One thread each: a machine's other work then enters the processor seconds least.
bench-peers: venv venv-peers
	$(RUN) benchmarks/cache_fill.py --peer-python .venv-peers-trl-1.16/bin/python
	$(RUN) benchmarks/peers_step.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/peers_step.py --turns 2 --per-turn 2 --lengths 128 256 512 1024
	OMP_NUM_THREADS=1 $(RUN) benchmarks/head_peers.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/trl_heads.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/long_context.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/growth.py
	$(RUN) benchmarks/publish.py

# What --help prints without importing transformers, and the reference of the command line in docs/.
help-pages: venv
	for c in train online reward; do $(RUN) -c "from bco_fast.cli.$$c import $$c; $$c(['--help'])" > bco_fast/cli/help/$$c.txt || exit 1; done
	$(RUN) docs/_cli.py

# Two programs at a time, one thread each. PPO and RLOO need TRL 1.12's environment, which is built once. With FEEDBACK=file also on
# real text (claims_real.py); without it, those rows stay as they are. The longest programs go first.
# Processor time: 45 minutes with real text, 18 without, so 23 and 9 minutes on two idle cores.
CLAIMS_REAL = claims-real-0 claims-real-1 claims-real-2
CLAIMS_PPO = claims-ppo-0 claims-ppo-1 claims-ppo-2
CLAIMS = $(if $(FEEDBACK),$(CLAIMS_REAL)) claims-small $(CLAIMS_PPO)
.PHONY: claims-small $(CLAIMS_REAL) $(CLAIMS_PPO)
claims: venv .venv-peers-trl-1.12/.made
	$(MAKE) --no-print-directory -j 2 $(CLAIMS)
	$(if $(FEEDBACK),,@echo 'no FEEDBACK=file: the rows on real feedback stay those of benchmarks/results/claims_real.json')
	$(RUN) benchmarks/claims_page.py
	$(RUN) benchmarks/publish.py

claims-small:
	OMP_NUM_THREADS=1 $(RUN) benchmarks/claims.py

$(CLAIMS_REAL): claims-real-%:
	OMP_NUM_THREADS=1 $(RUN) benchmarks/claims_real.py --data $(FEEDBACK) --seeds $*

$(CLAIMS_PPO): claims-ppo-%:
	OMP_NUM_THREADS=1 $(RUN) benchmarks/online_ppo.py --seed $*

docs: .venv-docs/.made
	.venv-docs/bin/python -m mkdocs build --strict --quiet

.venv-docs/.made: docs/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers-* .venv-docs build *.egg-info .pytest_cache .ruff_cache
