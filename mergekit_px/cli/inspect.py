"""``pxmerge inspect``: what a checkpoint holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergekit_px.cli._options import AllowPickle, Json
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._units import show_bytes, show_count

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a file, org/name or org/name@revision.")]
Tensors = Annotated[str | None, typer.Option("--tensors", metavar="GLOB", help="List the tensors of such names.")]


def inspect(model: Model, tensors: Tensors = None, allow_pickle: AllowPickle = False, json: Json = False) -> int:
    """Show files, sizes, dtypes, parameters and layers of a checkpoint, and what kind it is.

    Only headers are read; of a model on the Hub nothing else is downloaded.

    \b
    Examples:
      pxmerge inspect ./merged
      pxmerge inspect org/name@main --tensors "*.mlp.*"
      pxmerge inspect ./merged --json
    """
    from mergekit_px.inspection.describe import ModelDocument, describe, tensor_rows
    from mergekit_px.plan.inputs import open_input

    output = output_for(json=json)
    source = open_input(model, allow_pickle=allow_pickle)
    document = describe(source)
    if tensors is not None:
        document["matching"] = tensor_rows(source.checkpoint, tensors)
    output.document(document, ModelDocument)
    _show(document, output)
    if tensors is not None and not document["matching"]:
        output.warning(f"no tensor has a name like {tensors}")
    return 0


def _show(document: dict[str, Any], output: Output) -> None:
    tied = {True: "yes, by its config", False: "no, by its config", None: None}[document["tied_embeddings"]]
    layers = ", ".join(f"{count} in {stack or 'the top level'}" for stack, count in document["layers"].items())
    output.pairs(
        [
            ("model", document["reference"]),
            ("commit", document["commit"]),
            ("kind", document["kind"]),
            ("of the base", document["base_fingerprint"] and document["base_fingerprint"][:16]),
            ("architecture", ", ".join(document["architectures"]) or document["model_type"]),
            ("license", document["license"]),
            ("tensors", document["tensors"]),
            ("parameters", show_count(document["parameters"])),
            ("size", show_bytes(document["bytes"])),
            ("layers", layers or None),
            ("tied embeddings", tied),
            ("stored as", ", ".join(f"{count} x {title}" for title, count in document["stored_as"].items()) or None),
            ("embedding, head", ", ".join(document["embedding_and_head"]) or None),
            ("notes", "; ".join(document["notes"]) or None),
            ("side files", ", ".join(document["side_files"]) or None),
            ("metadata", ", ".join(f"{key}: {text}" for key, text in document["metadata"].items()) or None),
        ]
    )
    output.heading("Dtypes")
    output.table(
        [Column("dtype"), Column("tensors", "right"), Column("parameters", "right"), Column("size", "right")],
        [
            (name, entry["tensors"], show_count(entry["parameters"]), show_bytes(entry["bytes"]))
            for name, entry in document["dtypes"].items()
        ],
    )
    if document["components"]:
        output.heading("Components")
        output.table(
            [
                Column("folder"),
                Column("class"),
                Column("dtype"),
                Column("parameters", "right"),
                Column("size", "right"),
            ],
            [
                (
                    folder or ".",
                    entry["class"] or "",
                    ", ".join(entry["dtypes"]),
                    show_count(entry["parameters"]),
                    show_bytes(entry["bytes"]),
                )
                for folder, entry in document["components"].items()
            ],
        )
    output.heading("Files")
    output.table(
        [Column("file"), Column("tensors", "right"), Column("size", "right")],
        [(file["name"], file["tensors"], show_bytes(file["bytes"])) for file in document["files"]],
    )
    if "matching" in document:
        output.heading("Tensors")
        output.table(
            [Column("name"), Column("dtype"), Column("shape", "right"), Column("size", "right", essential=False)],
            [
                (row["name"], row["dtype"], " x ".join(map(str, row["shape"])) or "scalar", show_bytes(row["bytes"]))
                for row in document["matching"]
            ],
        )
