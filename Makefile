# `make demo` and `make test` set up all that they need: Python 3.11 or newer, pip and a network that reaches PyPI.
PYTHON ?= python3
BIN := .venv/bin
DEMO := results/demo

.PHONY: demo app test lint clean

demo: .venv/installed
	@rm -rf $(DEMO)
	$(BIN)/python train.py --model DiT-N/2 --mixer pdessm --vae none --image-size 8 --num-classes 10 \
		--global-batch-size 32 --lr 3e-3 --max-steps 3200 --log-every 400 --results-dir $(DEMO)
	$(BIN)/python sample.py --ckpt $(DEMO)/000-DiT-N-2/checkpoints/0003200.pt --samples-per-class 10 \
		--num-sampling-steps 100 --cfg-scale 3 --out $(DEMO)/digits.png
	@echo "Ten digits of each class, drawn by the model that was just trained: $(CURDIR)/$(DEMO)/digits.png"

app: .venv/app-installed
	$(BIN)/python app.py

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/app-installed: .venv/installed requirements-app.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	@touch $@

clean:
	rm -rf .venv $(DEMO)
