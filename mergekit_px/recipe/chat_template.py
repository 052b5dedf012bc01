"""Chat templates that a recipe names, and whether one of its own can be read."""

from __future__ import annotations

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for

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
"""Templates that a recipe may name, from the published form of each prompt format."""


def jinja_text(template: str) -> str:
    """The text of a template that is given by its name or as it is."""
    return CHAT_TEMPLATES.get(template, template)


def check_chat_template(template: str, where: str) -> None:
    """Read a template as transformers does when a chat is tokenized.

    Raises:
        RecipeError: neither Jinja that can be read nor the name of a template.
    """
    if template in CHAT_TEMPLATES:
        return
    if "{{" not in template and "{%" not in template:
        hint = hint_for(template, CHAT_TEMPLATES) or f"give Jinja text, or one of {', '.join(CHAT_TEMPLATES)}"
        raise RecipeError(f"there is no chat template '{template[:80]}'", where=where, hint=hint)
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The mark of what the assistant says, which only transformers has."""

        tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    reader = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    try:
        reader.compile(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        what = f"the chat template cannot be read as Jinja: {' '.join(str(error.message).split())}"
        raise RecipeError(what + (f" (its line {line})" if line else ""), where=where) from None
