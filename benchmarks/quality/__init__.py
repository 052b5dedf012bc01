"""What merging and learning gain on real data: scikit-learn's digits, tiny vision transformers, all controls.

    python -m benchmarks.quality                         # every experiment, three seeds; from the repository's root
    python -m benchmarks.quality ofasd atlas --seeds 1   # some of them, to look at
    python -m benchmarks.quality --jobs 2                # two seeds at a time, each on one thread

It prints a table of test accuracies in percent and which claims hold in the mean over the seeds, and fails where one
does not. Claims that are not made are not checked: nothing here says that distillation beats training all weights, or
that alignment beats a fine-tune that begins with the task vector.

Each experiment is a module of this package that holds ``EXPERIMENTS``, a tuple of ``Experiment``: a name, a function
that is given a ``Lab`` (the data in the order of one seed, a folder, training, merging, scoring) and returns ``Scores``
(a number for each row of the table, titles in brackets for what is not an accuracy), and claims (a text, and a function
of the mean scores). A new module is found by itself.
"""
