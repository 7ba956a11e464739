"""What the training loop in train.py calls, one subject a file.

objectives.py     the loss of each stage
phrases.py        the data set of the vision stage
texts.py          the data set of the text stage
sampler.py        which samples make up which step; micro-batches
optimizers.py     learning rate, AdamW, Muon
lora.py           which parameters train; LoRA; the model that comes out
distributed.py    processes, DDP, FSDP2
graphs.py         CUDA graphs: a step of a small model as one launch
resume.py         checkpoints of a run, stopping and going on
pickles.py        refuses a checkpoint with code in its pickle
run_log.py        log.jsonl, runs.jsonl, the progress
validation.py     a validation every N steps, the models of chosen steps
cost.py           FLOPs, MFU, memory and hours
"""
