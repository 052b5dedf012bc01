"""Adapters: formats on disk, what they make of a base's tensors, and adapters out of adapters. No recipe, no plan.

    config        ``adapter_config.json``
    peft_keys     the tensor names of PEFT, taken apart
    single_file   the formats without a configuration: kohya, LyCORIS, diffusers, ComfyUI
    base_names    an adapter's module names -> the tensors of a base
    ties          tied embeddings and heads
    binder        what the families share when they are bound to a base
    registry      the kinds that can be merged, and why the others cannot
    patch         how one tensor changes
    adapter       ``Adapter.bind(base)`` -> the patches
    open          a folder or a file -> ``Adapter``

and one file for each family: lora, dora, experts, adalora, loha, lokr, ia3, oft, vera, hra, hira, ln_tuning, shira,
miss, tokens, lycoris.
"""
