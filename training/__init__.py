"""What the training loop in train.py calls, one subject a file.

objectives.py     the loss of each stage
optimizers.py     Muon, AdamW, the learning rate schedule
lora.py           which parameters train; low-rank adapters
distributed.py    processes, DDP, FSDP2
device.py         which device and precision a run uses
sampler.py        which samples make up which step; micro-batches of one rank
resume.py         checkpoints of a run, and going on from them
run_log.py        log.jsonl, runs.jsonl, the progress line
cost.py           FLOPs, MFU, and what a run will need
"""
