"""What the training loop in train.py calls, one subject a file.

objectives.py     the loss of each stage
phrases.py        the data set of the vision stage: images and phrases
texts.py          the data set of the text stage: tokenized once, mapped from a file
sampler.py        which samples make up which step; the micro-batches of one rank
optimizers.py     learning rate schedule, AdamW, Muon
lora.py           which parameters train; low-rank adapters; the model that comes out
distributed.py    processes, DDP, FSDP2
device.py         which device and precision a run uses
resume.py         checkpoints of a run, stopping and going on
run_log.py        log.jsonl, runs.jsonl, the progress
validation.py     a small validation every N steps, the models of chosen steps
cost.py           FLOPs, MFU, and what a run will need
"""
