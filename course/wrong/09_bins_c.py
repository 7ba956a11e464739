def pack_into_bins(lengths, budget):
    number = max(1, -(-sum(lengths) // budget))
    groups = [[0, []] for _ in range(number)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [group for group in groups if group[0] + lengths[i] <= budget]
        # Where nothing fits, the emptiest is overfilled.
        emptiest = min(fitting or groups, key=lambda group: group[0])
        emptiest[0] += lengths[i]
        emptiest[1].append(i)
    return [sorted(indices) for _, indices in groups if indices]
