from training.distributed import IGNORE_INDEX, all_reduce, dist


def pad_micro_batches(micro_batches, process):
    (largest,) = all_reduce([len(micro_batches)], process, dist.ReduceOp.MAX)
    missing = int(largest) - len(micro_batches)
    if not missing:
        return micro_batches

    # A copy of the dict still has the same tensor.
    empty = dict(micro_batches[-1])
    empty["targets"].fill_(IGNORE_INDEX)
    empty["num_tokens"] = empty["attention_pairs"] = 0
    return micro_batches + [empty] * missing
