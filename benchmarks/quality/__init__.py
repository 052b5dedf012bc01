"""What merging and learning gain on real data: scikit-learn's digits, tiny vision transformers, all controls.

    python -m benchmarks.quality                         # every experiment, five seeds; from the repository's root
    python -m benchmarks.quality ofasd atlas --seeds 1   # some of them, to look at
    python -m benchmarks.quality --jobs 2                # two seeds at a time, each on one thread

It prints a table of test accuracies in percent, and how large differences are on average over the seeds. One that is
below two of its standard errors is called a tie. Claims are differences that must be above: the command fails where one
is not. Others are shown alone: nothing here claims that distillation beats training all weights, or that alignment
beats a fine-tune that begins with the task vector.

Each experiment is a module of this package that holds ``EXPERIMENTS``, a tuple of ``Experiment``: a name, a function
that is given a ``Lab`` (the data in the order of one seed, a folder, training, merging, scoring) and returns ``Scores``
(a number for each row of the table, titles in brackets for what is not an accuracy), and claims (a text, and a function
of the scores that is above 0 where it is true). A new module is found by itself.
"""
