"""Class prototypes on merged adapters: ACMap's centroid prototype mapping (CVPR 2025, arXiv 2412.18219).

prototypes    the table: one vector to a class, what it was measured under, and how far it moves
class_means   sums of features by class
arrays        data files, read an array at a time
sources       features under each merged adapter: from a file, or from a model
backbone      a model with the tensors of an adapter in it
readout       which output of a model the feature is
pending       the passes of an interrupted mapping
mapping       a task's prototypes into the state
drift         prototypes measured again on old data
classify      the nearest prototype by cosine
export        prototypes as the weights of a linear head, and merged adapters as files
"""
