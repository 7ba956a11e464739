def pack_into_bins(lengths, budget):
    # The longest first, each into the first group with room: few groups, the last nearly empty.
    groups, loads = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for n, load in enumerate(loads):
            if load + lengths[i] <= budget:
                groups[n].append(i)
                loads[n] += lengths[i]
                break
        else:
            groups.append([i])
            loads.append(lengths[i])
    return groups
