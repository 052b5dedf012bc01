"""What a mergekit config says of the result: dtype and chat template."""

from __future__ import annotations

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, Place

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        " {{ message['content'] | trim }}{{ eos_token }}{% else %}[INST] {{ message['content'] | trim }} [/INST]"
        "{% endif %}{% endfor %}"
    ),
    "exaone": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}[|system|][|endofturn|]\n"
        "{% endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}
"""Templates that a config may name, from the published form of each prompt format."""

DTYPES = ("bfloat16", "float16", "float32", "float64")


def read_dtype(node: Node | None, key: str) -> Node | None:
    """A dtype by its name in torch.

    Raises:
        RecipeError: it is none that mergekit computes in.
    """
    if node is None:
        return None
    name = node.value.removeprefix("torch.") if isinstance(node.value, str) else None
    if name not in DTYPES:
        hint = hint_for(name, DTYPES) if name is not None else None
        raise RecipeError(f"'{key}' cannot be {shown(node.value)}", where=str(node.place), hint=hint)
    return Node(name, node.place)


def precision_differences(exact: bool, dtype: Node | None, out_dtype: Node | None) -> list[str]:
    """How arithmetic differs, given ``dtype`` (in which mergekit computes, unless ``exact``) and ``out_dtype``."""
    told: list[str] = []
    if dtype is None and not exact:
        told.append("Everything is computed in float32 and rounded once; mergekit computes in the inputs' dtype.")
    if dtype is None and out_dtype is None:
        told.append(
            "Without dtype the result has the dtype of the base model, or else of the first model; in mergekit it has "
            "the widest of the inputs' dtypes."
        )
    if dtype is not None and dtype.value == "float64":
        told.append("Everything is computed in float32 (in float64 where inputs are stored so); mergekit uses float64.")
    elif dtype is not None and dtype.value != "float32":
        told.append(
            f"Inputs are read as they are stored; mergekit rounds them to {dtype.value} first."
            if exact
            else "Inputs are read as they are stored, everything is computed in float32, and the result is rounded "
            f"once; mergekit rounds the inputs to {dtype.value} first and computes in {dtype.value}."
        )
    return told


def read_chat_template(node: Node | None) -> Node | None:
    """The chat template as Jinja text; ``auto`` stands for mergekit's choice.

    Raises:
        RecipeError: neither Jinja nor the name of a template.
    """
    if node is None or node.value == "":
        return None
    if not isinstance(node.value, str):
        raise RecipeError(f"'chat_template' is text, not {shown(node.value)}", where=str(node.place))
    if node.value == "auto" or "{{" in node.value or "{%" in node.value:
        return node
    if node.value not in CHAT_TEMPLATES:
        hint = hint_for(node.value, ["auto", *CHAT_TEMPLATES])
        raise RecipeError(f"there is no chat template '{node.value[:80]}'", where=str(node.place), hint=hint)
    return Node(CHAT_TEMPLATES[node.value], node.place)


def not_yet(what: str, place: Place, hint: str | None = None) -> RecipeError:
    """The error for what mergekit has and pxmerge does not."""
    return RecipeError(f"not supported yet: {what}", where=str(place), hint=hint)
