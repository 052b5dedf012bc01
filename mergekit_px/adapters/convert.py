"""LoRA from one format into another: the numbers stay as they are, names and the place of alpha change."""

from __future__ import annotations

from pathlib import Path

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.lora import PLAIN_BY_PEFT, residual_start
from mergekit_px.adapters.lora_modules import read_lora_modules
from mergekit_px.adapters.save import Format, save_diffusers, save_kohya, save_peft
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.task_vector import description
from mergekit_px.errors import AdapterError

_CARRIED = ("task_type", "revision", "peft_version")


def convert(
    adapter: Adapter,
    path: Path,
    to: Format,
    *,
    base: Checkpoint | None = None,
    component: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``adapter`` in another format.

    Args:
        base: needed to give names with underscores their dots back.
        component: what the modules belong to where the adapter does not say (``unet`` if left out); for ``peft``,
            the component to take of a file that has several.

    Raises AdapterError for what the other format cannot hold; OutputError, WriteError.
    """
    start = residual_start(adapter.config) if adapter.kind == "LORA" else None
    if start is not None:
        raise adapter.config.error(
            f"cannot be converted: it was started with {shown(start)}, and its factors are relative to a residual base",
            hint=PLAIN_BY_PEFT,
        )
    modules = read_lora_modules(adapter, base)
    if to != "peft":
        save = save_kohya if to == "kohya" else save_diffusers
        described = description(adapter.checkpoint.metadata)
        save(path, modules, component=component or "unet", described=described, overwrite=overwrite)
        return
    components = {module.component for module in modules}
    if len(components) > 1 and component is not None:
        modules = [module for module in modules if module.component == component]
        if not modules:
            raise AdapterError(
                f"there is nothing for the component {component}",
                where=adapter.label,
                hint=f"the file has {', '.join(sorted(str(each) for each in components))}",
            )
    values = adapter.config.values
    save_peft(
        path,
        modules,
        base_model_name=adapter.base_model_name,
        fan_in_fan_out=adapter.config.flag("fan_in_fan_out"),
        fields={name: values[name] for name in _CARRIED if name in values},
        overwrite=overwrite,
    )
