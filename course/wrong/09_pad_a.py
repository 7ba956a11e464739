from training.distributed import all_reduce, dist


def pad_micro_batches(micro_batches, process):
    (largest,) = all_reduce([len(micro_batches)], process, dist.ReduceOp.MAX)
    missing = int(largest) - len(micro_batches)
    # The last one again, as it is: its targets count more than once.
    return micro_batches + [micro_batches[-1]] * missing if missing else micro_batches
