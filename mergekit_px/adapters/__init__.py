"""Adapters: formats on disk, what they make of a base's tensors, and adapters out of adapters. No recipe, no plan.

    config        ``adapter_config.json``
    peft_keys     the tensor names of PEFT, taken apart
    single_file   the formats without a configuration: kohya, LyCORIS, diffusers, ComfyUI
    base_names    an adapter's module names -> the tensors of a base
    ties          tied embeddings and heads
    binder        what the families share when they are bound to a base
    registry      the kinds that can be merged, and why the others cannot
    targets       what the configuration says is adapted, held against the tensors
    patch         how one tensor changes
    adapter       ``Adapter.bind(base)`` -> the patches
    open          a folder or a file -> ``Adapter``
    describe      what an adapter holds: ranks, scales, norms
    remarks       what a user should be told of it

one file for each family: lora, dora, experts, adalora, loha, lokr, ia3, oft, vera, hra, hira, ln_tuning, shira, miss,
tokens, lycoris; and adapters out of adapters and models:

    lora_modules  LoRA factors, whatever the format
    updates       updates dW as factored matrices
    merge         several adapters into one (merge_options, merge_spaces, mergers)
    extract       an adapter from a base and a fine-tune
    acmap         the running mean of task adapters
    save          PEFT folders, kohya and diffusers files
    convert       from one format into another
"""
