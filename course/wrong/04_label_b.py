import torch


class PhraseDataset:
    def label(self, phrases, indices):
        # Known only by the kind of record.
        is_true = torch.zeros(len(phrases), len(indices), dtype=torch.bool)
        is_known = is_true.clone()
        for column, i in enumerate(indices):
            if i is not None:
                for row, (about, phrase) in enumerate(phrases):
                    is_known[row, column] = about in self.images[i].record_types
                    said = (about[0], phrase) in self.images[i].positives
                    is_true[row, column] = is_known[row, column] and said
        return is_true, is_known
