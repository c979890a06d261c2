"The shop that both sides are given: few items, some without a text or an image, and histories of all lengths."
import numpy as np
import torch

from mmseqrec.data.sequences import Batch
from mmseqrec.features.encoders import catalogue_from_arrays

V, MAX_LEN, TEXT_SIZE, IMAGE_SIZE = 23, 7, 10, 8
NO_IMAGE, NO_TEXT = (2, 5, 11), (7,)
LENGTHS = (1, 3, 7, 2, 5, 6, 4, 1)


def shop(missing=True, n_contents=1, text_size=TEXT_SIZE, image_size=IMAGE_SIZE):
    "A catalogue; texts with words left out as well."
    rng = np.random.default_rng(0)
    text, image, dropped = (rng.standard_normal((V, n_contents, size)).astype(np.float32) for size in (text_size, image_size, text_size))
    for item in NO_IMAGE if missing else (): image[item - 1] = 0
    for item in NO_TEXT if missing else (): text[item - 1] = dropped[item - 1] = 0
    return catalogue_from_arrays([str(row) for row in range(1, V + 1)], text, image, "float32", dropped)


def histories(last_has_text=True, twice=True):
    "Eight histories, padded to the longest there can be, with their next items; some items come again, one next item too."
    rng = np.random.default_rng(1)
    item_seq = torch.from_numpy(rng.integers(1, V + 1, (len(LENGTHS), MAX_LEN)))
    item_seq[2, 3], item_seq[4, 1] = item_seq[2, 1], item_seq[4, 0]
    item_seq[0, 0], item_seq[1, 0], item_seq[5, 2] = NO_IMAGE[0], NO_TEXT[0], NO_IMAGE[1]
    if not last_has_text: item_seq[3, 1] = NO_TEXT[0]
    pos_item = torch.from_numpy(rng.permutation(V)[:len(LENGTHS)] + 1)
    if twice: pos_item[4] = pos_item[1]
    length = torch.tensor(LENGTHS)
    return Batch(item_seq.masked_fill(torch.arange(MAX_LEN) >= length[:, None], 0), length, pos_item)


def theirs_of(batch):
    "The names that RecBole has for a batch."
    return {"item_id_list": batch.item_seq, "item_length": batch.item_seq_len, "item_id": batch.pos_item}
