"""The components of a pipeline: what each adapter format, and a checkpoint in one file, calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLAT_PREFIXES: Mapping[str, str | None] = {
    "lora_unet_": "unet",
    "lora_prior_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_prior_te_": "text_encoder",
    "lycoris_": None,
}
"""Of names with underscores for dots; the component that each means."""

DOTTED_PREFIXES: Mapping[str, str] = {
    "unet.": "unet",
    "transformer.": "transformer",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
"""Of names with dots, as diffusers and ComfyUI write them."""

_KOHYA: Mapping[str, str] = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
"""Kohya's programs call every denoising network a unet."""

_FIRST_OF_SEVERAL = "lora_te1_"
"""The first text encoder of a model that has several; ``lora_te_`` is the only one of Stable Diffusion 1 and 2."""

COMPONENTS = tuple(_KOHYA)

DENOISERS = ("unet", "transformer")
"""Two names of one thing: formats disagree on what the denoising network of a pipeline is called."""


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """Where a checkpoint in one file keeps a component.

    Attributes:
        prefix: kohya's, where the component alone does not tell it.
        differs: the names below are those of other classes than diffusers and transformers have.
    """

    component: str | None
    prefix: str | None = None
    differs: bool = False


STORED_PREFIXES: Mapping[str, StoredPlace] = {
    "model.diffusion_model.": StoredPlace("unet", differs=True),
    "cond_stage_model.transformer.": StoredPlace("text_encoder"),
    "conditioner.embedders.0.transformer.": StoredPlace("text_encoder", _FIRST_OF_SEVERAL),
    "text_encoders.clip_l.transformer.": StoredPlace("text_encoder", _FIRST_OF_SEVERAL),
    "text_encoders.clip_g.transformer.": StoredPlace("text_encoder_2"),
    "text_encoders.t5xxl.transformer.": StoredPlace("text_encoder_3"),
    "conditioner.embedders.1.model.": StoredPlace(None, differs=True),
    "cond_stage_model.model.": StoredPlace(None, differs=True),
    "first_stage_model.": StoredPlace(None, differs=True),
}
"""The layouts of Stable Diffusion 1, 2, XL and 3 in one file. Without a component: OpenCLIP's layers, which are fused,
and the autoencoder; the adapter formats have no names for these."""


def stored_place(name: str) -> tuple[StoredPlace, str] | None:
    """The place of a module that is named as in a checkpoint of one file, and its name within; None for other names."""
    return next(
        ((place, name.removeprefix(prefix)) for prefix, place in STORED_PREFIXES.items() if name.startswith(prefix)),
        None,
    )


def kohya_prefix(component: str, *, has_more_encoders: bool) -> str | None:
    """What kohya's programs put before a component's names; None for one that they do not know.

    Args:
        has_more_encoders: the file is of a model with several text encoders.
    """
    return _FIRST_OF_SEVERAL if component == "text_encoder" and has_more_encoders else _KOHYA.get(component)
