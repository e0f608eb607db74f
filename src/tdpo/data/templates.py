"""Chat templates that can be asked for by name, for tokenizers that bring none."""

from __future__ import annotations

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DIALOGUE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}\n\nHuman: {{ message.content }}"
    "{% elif message.role == 'assistant' %}\n\nAssistant: {{ message.content }}"
    "{% else %}{{ raise_exception('this template knows the roles system, user and assistant') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}\n\nAssistant:{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR, "dialogue": DIALOGUE}
"""By name: turns marked by ``<|im_start|>``, by ``<|role|>`` and the end token, or in plain text as in HH dialogues,
which needs no tokens of its own and so suits a model that has only seen text."""
