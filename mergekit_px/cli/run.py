"""``pxmerge run``: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from mergekit_px.cli._merge import merge_file
from mergekit_px.cli._options import Locked, RecipeFile, RunOptions

Part = Annotated[
    str | None,
    typer.Option("--part", metavar="K/N", help="Write the K-th of N parts of the output, as a job of an array."),
]


Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="CLUSTER",
        help="Hand the files of the output out to Ray: ray begins it here, ray:HOST:PORT joins one.",
    ),
]


def run(
    recipe: RecipeFile,
    options: RunOptions,
    part: Part = None,
    cluster: Cluster = None,
    locked: Locked = False,
) -> int:
    """Run a recipe and write the merged model.

    The output folder gets the weights, the edited config, the tokenizer and other side files, a model card, the
    recipe and a lock file with the hash of every file. Equal inputs give equal bytes on every run. The folder's name
    is printed on stdout when all is done.

    A run that was interrupted goes on with --resume, and the result is the same to the byte.

    With --part the files of the output are shared out among the jobs of an array, on one machine or on many with a
    common file system; --shard-size says how many files there are. A part that is run again goes on where it was.
    `pxmerge publish` puts the parts together. With --cluster the workers of a Ray cluster take the parts, what is lost
    with one is begun again, and the result is put together at the end; an unfinished run goes on when it is run again.

    An output in an object store, -o s3://bucket/key, is written file by file, and goes on with --resume too.

    With --locked, Hub models are those of the commits in the recipe's lock file and local files must have its hashes;
    whatever moved is named, and nothing is merged. `pxmerge lock` makes that file.

    \b
    Examples:
      pxmerge run recipe.yaml
      pxmerge run recipe.yaml -o ./merged --memory 4GB
      pxmerge run recipe.yaml --set merge.params.density=0.3 output.dtype=float32
      pxmerge run mergekit.yml --resume
      pxmerge run recipe.yaml --locked
      pxmerge run recipe.yaml -o ./merged --part $SLURM_ARRAY_TASK_ID/8
      pxmerge run recipe.yaml -o ./merged --cluster ray:10.0.0.1:6379
    """
    return merge_file(recipe, options, part=part, cluster=cluster, locked=locked)
