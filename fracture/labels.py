"""The classes and the splits, defined here alone."""

FRACTURE = 1
NORMAL = 0
CLASS_NAMES = ("normal", "fracture")  # CLASS_NAMES[label]

# Training fits the weights; validation chooses the epoch; test is read once, at the end.
SPLITS = ("train", "val", "test")
