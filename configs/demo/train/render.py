"""The prompt format in Python: text pieces with a mark on those the model has to produce.

The chat template (TEMPLATE) says the same in Jinja; `check_versions.py` proves the two equal by token ids.
"""

from __future__ import annotations

import json
from typing import Any

from loops import Conversation, Message

START, END, CALL, CALL_END, PAD = "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<pad>"

TEMPLATE = """\
{%- set ns = namespace(system='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set ns.system = messages[0]['content'] -%}
{%- endif -%}
{%- if ns.system or tools -%}
{{- '<|im_start|>system\\n' + ns.system -}}
{%- if tools -%}
{{- ('\\n' if ns.system else '') + 'Tools:' -}}
{%- for tool in tools -%}
{%- set function = tool['function'] if tool['function'] is defined else tool -%}
{%- set parameters = function['parameters'] if function['parameters'] is defined else {} -%}
{%- set properties = parameters['properties'] if parameters and parameters['properties'] is defined else {} -%}
{{- '\\n' + function['name'] + '(' -}}
{%- for name in properties -%}
{%- set kind = properties[name]['type'] if properties[name]['type'] is string else 'string' -%}
{{- ('' if loop.first else ', ') + name + ': ' + kind -}}
{%- endfor -%}
{{- ')' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and message['role'] == 'system') -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['text'] is defined else '' -}}
{%- endfor -%}
{%- endif -%}
{%- if message['tool_calls'] is defined and message['tool_calls'] -%}
{%- for call in message['tool_calls'] -%}
{%- set function = call['function'] if call['function'] is defined else call -%}
{{- ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n{"name": "' + function['name'] -}}
{{- '", "arguments": ' -}}
{{- function['arguments'] if function['arguments'] is string else (function['arguments'] | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """One call as the model writes it."""
    body = json.dumps(arguments, ensure_ascii=False)
    return f'{CALL}\n{{"name": "{name}", "arguments": {body}}}\n{CALL_END}'


def turn_text(message: Message) -> str:
    """What an assistant message consists of: text, calls, or both."""
    parts = [str(message["content"])] if message.get("content") else []
    calls: Any = message.get("tool_calls") or []
    parts += [call_text(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return "\n".join(parts)


def system_text(conversation: Conversation) -> str:
    """The system block's content: the system message and one line per tool."""
    first = conversation.messages[0]
    parts = [str(first["content"])] if first["role"] == "system" else []
    if conversation.tools:
        lines = []
        for tool in conversation.tools:
            lines.append(f"{tool.name}({', '.join(f'{name}: {kind}' for name, kind in tool.parameters)})")
        parts.append("\n".join(["Tools:", *lines]))
    return "\n".join(parts)


def pieces(conversation: Conversation) -> list[tuple[str, bool]]:
    """The whole conversation as (text, is the model's) in order; cuts lie at line ends, where tokens never join."""
    out: list[tuple[str, bool]] = []
    system = system_text(conversation)
    if system:
        out.append((f"{START}system\n{system}{END}\n", False))
    for message in conversation.messages:
        if message["role"] == "system":
            continue
        if message["role"] == "assistant":
            out.append((f"{START}{conversation.role}\n", False))
            out.append((turn_text(message) + END, True))
            out.append(("\n", False))
        else:
            out.append((f"{START}{message['role']}\n{message['content']}{END}\n", False))
    return out
