"""Bytes: safetensors files, folders of them, and how they are read and written. No recipe, no methods.

    dtypes        the element types of the format, one table
    header        parse, check and build the header of one file
    index         read and build the JSON index of a sharded save
    open          a folder or a file -> ``Checkpoint`` (headers only)
    contents      what ``Checkpoint`` and its parts say
    state_dict    tensors in memory, behind the same interface
    pickled       ``.bin`` and ``.pt`` files, only when asked for
    reader        byte ranges of tensors into given buffers
    layout        names, shapes, dtypes -> shards, headers, offsets
    destination   the output folder: what is in it, whether it may be used, whether there is room
    writer        planned bytes at planned offsets, journalled, published at the end
    publish       how a complete output gets its names
    side_files    which files travel with the weights
    fingerprint   a short name for the weights of a checkpoint
    task_vector   how a file says that it holds differences
    hashing       sha256 of files

Beneath them: ``positional`` (pread and pwrite, with a portable fallback), ``direct`` (past the page cache), ``held``
(bytes that wait to be hashed), ``file_pool``, ``ranges``, ``journal``, ``lock``, ``background`` (hashing and flushing
while a run goes on), ``json_text`` (strict JSON).
"""
