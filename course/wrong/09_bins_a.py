def pack_into_bins(lengths, budget):
    # In the order they come, each into the first group with room.
    groups, loads = [], []
    for i, length in enumerate(lengths):
        for n, load in enumerate(loads):
            if load + length <= budget:
                groups[n].append(i)
                loads[n] += length
                break
        else:
            groups.append([i])
            loads.append(length)
    return groups
