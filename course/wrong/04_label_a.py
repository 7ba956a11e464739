import torch


class PhraseDataset:
    def label(self, phrases, indices):
        # What an image does not say is false, whatever its language.
        is_true = torch.zeros(len(phrases), len(indices), dtype=torch.bool)
        is_known = is_true.clone()
        for column, i in enumerate(indices):
            if i is not None:
                for row, ((language, _), phrase) in enumerate(phrases):
                    is_true[row, column] = (language, phrase) in self.images[i].positives
                    is_known[row, column] = True
        return is_true, is_known
