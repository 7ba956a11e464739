# make demo: teach a model to see and to answer in three languages, on a laptop.   make test · make bench · make clean
# Every step is a command that is printed before it runs; type it yourself to change it. A second `make demo` goes on where the first one stopped.

OUT ?= out/demo
SEED ?= 0
PROCESSES ?= 1
WITHOUT ?=
VOCABULARY ?= en ko zh
TEXTS ?= en ko zh parallel
DICTIONARY ?= dictionary
PARTS ?= projector decoder.layers
PYTHON3 ?= python3

PYTHON := .venv/bin/python
DATA ?= $(OUT)/data
TRAIN := $(if $(filter 1,$(PROCESSES)),$(PYTHON),.venv/bin/torchrun --standalone --nproc_per_node=$(PROCESSES)) train.py

# step NAME,COMMAND: prints the command, runs it, and adds its seconds to timing.json
define step
@printf '\n\033[1m%s\033[0m\n' "$(strip $(2))"
@mkdir -p $(OUT) && printf '%s\n' "$(strip $(2))" >> $(OUT)/commands.txt
@start=$$($(PYTHON) -c "import time; print(time.time())"); $(strip $(2)) && $(PYTHON) -c "import json, pathlib, time; \
file = pathlib.Path('$(OUT)/timing.json'); times = json.loads(file.read_text()) if file.exists() else {}; \
times['$(1)'] = round(times.get('$(1)', 0) + time.time() - $$start, 1); file.write_text(json.dumps(times, indent=1) + '\n'); print(f'$(1): {time.time() - $$start:.0f} s')"
endef

.PHONY: demo ablation test bench clean
.DELETE_ON_ERROR:

demo: $(OUT)/report.html
	@printf '\nThe run on one page: %s\n' $(OUT)/report.html
	@printf '\nAsk it something yourself:\n  %s generate.py --model $(OUT)/instruct --image $(DATA)/pictures/unseen_pictures/00000.png "왼쪽에 무엇이 있나요?"\n' $(PYTHON)
	@$(PYTHON) -c "import json; times = json.load(open('$(OUT)/timing.json')); print('Seconds:', ', '.join(f'{k} {v:.0f}' for k, v in times.items()), '· together', round(sum(times.values())))"

.venv/installed: requirements.txt
	test -d .venv || $(PYTHON3) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(DATA)/world.json: | .venv/installed
	@mkdir -p $(OUT)
	$(call step,scenes,$(PYTHON) scenes.py -o $(DATA) --pictures 6000 --seed $(SEED)$(if $(SHARE), --share $(SHARE)))

pieces_en := 600
pieces_ko := 540
# 259 special pieces and bytes, and each of the 157 characters of the world's Chinese by itself
pieces_zh := 416 --max-piece-length 1
$(OUT)/%.model: $(DATA)/world.json
	$(call step,tokenizer,$(PYTHON) tokenizer.py train $(DATA)/text/$*.txt --vocab-size $(pieces_$*) -o $@)

$(OUT)/tokenizer.model: $(VOCABULARY:%=$(OUT)/%.model)
	$(call step,tokenizer,$(PYTHON) tokenizer.py merge $^ -o $@)

# Each stage starts from the model that the one before it left. WITHOUT=stage leaves a stage out, to see what it is for: make demo OUT=out/no-text WITHOUT=text
FRESH := --preset tiny --tokenizer $(OUT)/tokenizer.model
after_vision := $(if $(filter vision,$(WITHOUT)),$(FRESH),--model $(OUT)/vision)
after_text := $(if $(filter text,$(WITHOUT)),$(after_vision),--model $(OUT)/text)
after_align := $(if $(filter align,$(WITHOUT)),$(after_text),--model $(OUT)/align)
after_lookup := $(if $(filter lookup,$(WITHOUT)),$(after_align),--model $(OUT)/lookup)
after_drill := $(if $(filter drill,$(WITHOUT)),$(after_lookup),--model $(OUT)/drill)
needs = $(if $(filter $(1),$(WITHOUT)),$(2),$(OUT)/$(1)/config.json)
vision_needs := $(call needs,vision,$(OUT)/tokenizer.model)
text_needs := $(call needs,text,$(vision_needs))
align_needs := $(call needs,align,$(text_needs))
lookup_needs := $(call needs,lookup,$(align_needs))
drill_needs := $(call needs,drill,$(lookup_needs))

$(OUT)/vision/config.json: $(OUT)/tokenizer.model
	$(call step,vision,$(TRAIN) vision $(FRESH) --data $(DATA)/phrases.json $(DICTIONARY:%=--dictionary $(DATA)/text/%.txt) --lr 1e-3 --muon-lr 0.01 --batch 32 --steps 3300 --seed $(SEED) --resume -o $(OUT)/vision)

$(OUT)/text/config.json: $(vision_needs)
	$(call step,text,$(TRAIN) text $(after_vision) --data $(TEXTS:%=$(DATA)/text/%.txt) --lr 1e-3 --muon-lr 0.005 --batch 32 --steps 300 --seed $(SEED) --resume -o $(OUT)/text)

$(OUT)/align/config.json: $(text_needs)
	$(call step,align,$(TRAIN) align $(after_text) --data $(DATA)/captions.json --lr 2e-3 --batch 32 --steps 60 --seed $(SEED) --resume -o $(OUT)/align)

# The stage of instructions in three courses, from few questions to all: a decoder finds out how to look one thing up by another when little else is asked of it
# The words' rows stay as vision, dictionary and text left them (PARTS), so that a word which no picture was named with stays beside its translation
INSTRUCT := --parts $(PARTS) --lr 1e-3 --muon-lr 0.005 --seed $(SEED) --resume
$(OUT)/lookup/config.json: $(align_needs)
	$(call step,lookup,$(TRAIN) instruct $(after_align) --data $(DATA)/lookup.json $(INSTRUCT) --batch 32 --merge 4 --steps 750 -o $(OUT)/lookup)

$(OUT)/drill/config.json: $(lookup_needs)
	$(call step,drill,$(TRAIN) instruct $(after_lookup) --data $(DATA)/drill.json $(INSTRUCT) --batch 16 --merge 8 --steps 600 -o $(OUT)/drill)

$(OUT)/instruct/config.json: $(drill_needs)
	$(call step,instruct,$(TRAIN) instruct $(after_drill) --data $(DATA)/instruct.json $(INSTRUCT) --batch 16 --merge 8 --steps 2000 -o $(OUT)/instruct)

$(OUT)/eval.json: $(OUT)/instruct/config.json
	$(call step,evaluate,$(PYTHON) evaluate.py --model $(OUT)/instruct --data $(DATA)/unseen_pictures.json $(DATA)/unseen_combinations.json $(DATA)/cross_lingual.json -o $@)

$(OUT)/report.html: $(OUT)/eval.json
	$(call step,report,$(PYTHON) report.py $(OUT))

# What is each idea of X-LLaVA worth, and each language? The demo with one thing changed, on the same pictures and questions, at equal steps, some seeds of each; a run
# that is finished is not run again. `make ablation VARIANTS="full no-V" SEEDS="0 1"` does a part, `make -j2 ablation OMP_NUM_THREADS=1` two at a time.
SEEDS ?= 0 1 2
VARIANTS ?= full no-V no-P no-V-P en-ko en-zh low-ko
# without vocabulary expansion: the English tokenizer, which spells Korean and Chinese in bytes
no-V := VOCABULARY=en
# without bilingual pretraining: the text stage reads as much, but all of it English, and no dictionary is there
no-P := TEXTS=en DICTIONARY=
no-V-P := $(no-V) $(no-P)
# a world that speaks two languages, and one with a tenth of the Korean
en-ko := SHARE=zh=0 VOCABULARY="en ko" TEXTS="en ko parallel"
en-zh := SHARE=ko=0 VOCABULARY="en zh" TEXTS="en zh parallel"
low-ko := SHARE=ko=0.1

world_of = out/ablation/data$(if $(findstring SHARE,$($(1))),.$(1))
WORLDS := $(sort $(foreach variant,$(VARIANTS),$(call world_of,$(variant))/world.json))
RUNS := $(foreach seed,$(SEEDS),$(VARIANTS:%=out/ablation/%.$(seed)/eval.json))
comma := ,
seeds_of = $(1)=$(subst $() $(),$(comma),$(SEEDS:%=out/ablation/$(1).%/eval.json))
# compare NAME,VARIANTS,FLAGS: those of the variants that were run, against the first of them
compare = $(if $(word 2,$(filter $(VARIANTS),$(2))),$(PYTHON) evaluate.py compare \
$(foreach variant,$(filter $(VARIANTS),$(2)),$(call seeds_of,$(variant))) $(3) -o out/ablation/$(1).json)

ablation: $(WORLDS) $(RUNS)
	$(call compare,paper,full no-V no-P no-V-P)
	$(call compare,en-ko,full en-ko,--languages en ko)
	$(call compare,en-zh,full en-zh,--languages en zh)
	$(call compare,low-ko,full low-ko)
	$(PYTHON) report.py out/ablation

out/ablation/%/world.json:
	$(MAKE) -j1 $@ DATA=$(@D) OUT=out/ablation SEED=0 $($(patsubst .%,%,$(suffix $*)))

out/ablation/%/eval.json: | $(WORLDS)
	$(MAKE) -j1 $@ DATA=$(call world_of,$(basename $*)) OUT=$(@D) SEED=$(patsubst .%,%,$(suffix $*)) $($(basename $*))

# Two processes of one thread each: the kernels in Triton's interpreter take about as long as all else. Their report comes first
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	@report=$$(mktemp); $(PYTHON) -m pytest -q tests --ignore-glob='*test_kernels_*' > $$report 2>&1 & rest=$$!; \
	$(PYTHON) -m pytest -q tests/test_kernels_*.py; kernels=$$?; wait $$rest; rest=$$?; cat $$report; rm $$report; exit $$((kernels + rest))

# Speed: the kernels against PyTorch's own (on a GPU; else what compiles to what), the tokenizer against sentencepiece and Hugging Face
bench: .venv/installed
	$(PYTHON) kernels/bench.py
	$(PYTHON) tokenizer.py bench $(or $(TEXT),README.md) --vocab-size $(or $(VOCAB),400)

clean:
	rm -rf out .pytest_cache __pycache__ */__pycache__
