"""ItalyPowerDemand of the UCR archive, from the files that the package sktime ships, to arrays: 80 % of each label to train on.

python model_cards/italy_power_demand/make_data.py path/to/sktime/datasets/data/ItalyPowerDemand path/to/italy_power_demand
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split


source, folder = Path(sys.argv[1]), Path(sys.argv[2])
rows = []
for part in ("TRAIN", "TEST"):
    text = (source / f"ItalyPowerDemand_{part}.ts").read_text()
    rows += [line.rsplit(":", 1) for line in text.partition("@data")[2].split()]
values = np.array([row.split(",") for row, _ in rows], np.float32)
labels = np.array([{"1": "october to march", "2": "april to september"}[label] for _, label in rows])
train, test = train_test_split(np.arange(len(rows)), test_size=0.2, stratify=labels, random_state=0)
folder.mkdir(parents=True, exist_ok=True)
for name, chosen in (("train", np.sort(train)), ("test", np.sort(test))):
    np.savez(folder / f"{name}.npz", demand=values[chosen], label=labels[chosen])
