"""Train a fracture classifier on radiographs, on one machine or on a Ray cluster.

Importing this package starts nothing and imports neither Ray nor TensorFlow.
"""
