"""Prompts: a request's text, messages or token ids become the token ids that the model reads.

Text that comes from users, tools or earlier turns never becomes a control token (see ``marks``), and what the model
said in earlier turns is read as it said it where the ids are given (see ``continuing``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from loopmux.errors import BadRequestError, ConfigError
from loopmux.messages import Generate, ModelSpec
from loopmux.wire import unpack_tokens
from loopmux_worker.engine import continuing
from loopmux_worker.engine.continuing import Prompt
from loopmux_worker.engine.marks import Marks, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
"""What templates read; other keys (a client's own notes) do not reach them."""
_OWN_ARGUMENTS = frozenset(
    {
        "conversation", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt", "return_dict",
        "return_tensors", "continue_final_message", "sanitize_control_tokens", "tokenizer_kwargs", "padding",
        "truncation", "max_length", "return_assistant_tokens_mask", "documents",
    }
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
PLAIN_CHAT_STOP = "\nUser:"
"""Ends an answer in the plain chat format: a model that knows no turns goes on by writing the user's next line."""


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def shows_tools(tokenizer: Tokenizer) -> bool:
    """Whether its chat template shows tools to the model."""
    return "tools" in str(tokenizer.chat_template)


def check_template(tokenizer: Tokenizer, folder: object) -> None:
    """Find a chat template that cannot be read before a request does.

    Raises:
        ConfigError: it is no Jinja template.
    """
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{folder}: its chat template is no Jinja template (line {error.lineno}: {error.message}): copy "
            "chat_template.jinja or tokenizer_config.json again"
        ) from error
    except Exception:  # noqa: BLE001 - it can be read; what it does not take is a matter of each request
        return


def render(generate: Generate, model: ModelSpec, tokenizer: Tokenizer, ends: Collection[int] = ()) -> Prompt:
    """The prompt of a request.

    Args:
        generate: what is asked.
        model: of whom.
        tokenizer: the model's.
        ends: token ids that end an answer; without them earlier answers are read as the template writes them.

    Raises:
        BadRequestError: a message, tool or template argument is not what a template can take.
    """
    if generate.prompt_token_ids is not None:
        return Prompt(unpack_tokens(generate.prompt_token_ids))
    tools = _tools(generate)
    if generate.tool_choice == "none":
        tools = []
    plain = model.model_type == "base" or not has_template(tokenizer)
    if tools and plain:
        raise BadRequestError(_without_template(model))
    if model.model_type == "base" and generate.prompt is not None:
        return Prompt(_encode_plain(generate.prompt, model, tokenizer))
    messages = conversation(generate, model)
    answers = _answers(generate, len(messages))
    if plain:
        marks = Marks(tokenizer)
        return Prompt(marks.encode(plain_chat(marks.mark(messages)), start=True), sum(map(len, answers.values())))
    return _apply(generate, messages, tools, answers, model, tokenizer, ends)


def _tools(generate: Generate) -> list[dict[str, Any]]:
    """The tools as the model sees them, to whom ``strict`` means nothing."""
    shown: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(generate.tools):
        checked = checked_tool(tool, f"tools[{i}]")
        function = {key: value for key, value in checked["function"].items() if key != "strict"}
        if function["name"] in shown:
            raise BadRequestError(
                f"tools[{i}]: found the name {function['name']!r} again, expected each once: rename one"
            )
        shown[function["name"]] = {**checked, "function": function}
    return list(shown.values())


def _without_template(model: ModelSpec) -> str:
    """Why tools are refused, and what helps."""
    found = "is served as plain text (model_type: base)" if model.model_type == "base" else "has no chat template"
    remedy = "set model_type: instruct" if model.model_type == "base" else "put its chat_template.jinja into its folder"
    return (
        f"tools: found some, but the model {model.id!r} {found}, which could not show them to it: {remedy}, use "
        "another model, or give prompt_token_ids that show them"
    )


def uses_plain_chat(generate: Generate, model: ModelSpec, tokenizer: Tokenizer) -> bool:
    """Whether the answer is written in the plain chat format, which ends at ``PLAIN_CHAT_STOP``."""
    if generate.prompt_token_ids is not None or (model.model_type == "base" and generate.prompt is not None):
        return False
    return model.model_type == "base" or not has_template(tokenizer)


def conversation(generate: Generate, model: ModelSpec) -> list[dict[str, Any]]:
    """The messages as a template takes them, the model's system prompt in front unless there is one.

    Raises:
        BadRequestError: naming the message and what is wrong with it.
    """
    given = generate.messages or ({"role": "user", "content": generate.prompt},)
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(given)]
    if model.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": model.system_prompt})
    return messages


def _answers(generate: Generate, count: int) -> dict[int, list[int]]:
    """What the model produced for earlier answers, where the request says it; by the place among ``count`` messages."""
    given = generate.messages or ()
    ahead = count - len(given)  # the model's own system prompt
    answers = {}
    for i, message in enumerate(given):
        ids = message.get("token_ids") or ()
        if isinstance(ids, bytes) and len(ids) % 4 == 0:
            ids = unpack_tokens(ids)
        right = isinstance(ids, (list, tuple)) and all(type(one) is int and one >= 0 for one in ids)
        if not right or (ids and message["role"] != "assistant"):
            raise BadRequestError(
                f"messages[{i}].token_ids: found {ids!r:.80} in a message of {message['role']!r}, expected the list of "
                "token ids that the model produced for an assistant message"
            )
        if ids:
            answers[ahead + i] = list(ids)
    return answers


def plain_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages for a model without a template: ``User: …`` and so on in lines, the system message as it is."""
    parts = []
    for message in messages:
        content = message["content"] or ""
        head = "" if message["role"] in ("system", "developer") else f"{message['role'].capitalize()}: "
        parts.append(f"{head}{content}\n")
    return "".join(parts) + "Assistant:"


def _encode_plain(prompt: str, model: ModelSpec, tokenizer: Tokenizer) -> list[int]:
    text = f"{model.system_prompt}\n{prompt}" if model.system_prompt else prompt
    ids = list(tokenizer.encode(text, add_special_tokens=True))
    if not ids:
        raise BadRequestError("prompt: found an empty text, expected at least one token")
    return ids


def _message(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise BadRequestError(f"{path}.role: found {role!r}, expected one of {', '.join(ROLES)}")
    checked = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    checked["content"] = _content(message.get("content"), f"{path}.content")
    if "tool_calls" in checked:
        if role != "assistant":
            raise BadRequestError(f"{path}.tool_calls: found in a message of {role!r}, expected only in assistant ones")
        checked["tool_calls"] = _calls(checked["tool_calls"], f"{path}.tool_calls")
    for key in ("tool_call_id", "name", "reasoning_content"):
        if key in checked and not isinstance(checked[key], str):
            raise BadRequestError(f"{path}.{key}: found {type(checked[key]).__name__}, expected a text")
    return checked


def _content(content: object, path: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise BadRequestError(f"{path}: found {type(content).__name__}, expected a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise BadRequestError(f"{path}[{i}]: expected a part {{'type': 'text', 'text': …}}; only text is served")
        texts.append(text)
    return "".join(texts)


def _calls(calls: object, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise BadRequestError(f"{path}: found {type(calls).__name__}, expected a list")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequestError(f"{path}[{i}]: expected {{'function': {{'name': …, 'arguments': …}}}}")
        arguments = _arguments(function.get("arguments", {}), f"{path}[{i}].function.arguments")
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        checked.append(entry | ({"id": call["id"]} if "id" in call else {}))
    return checked


def _arguments(arguments: object, path: str) -> dict[str, Any]:
    """Arguments are maps inside; JSON texts, as HTTP clients have them, are taken."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise BadRequestError(f"{path}: found a text that is no JSON ({error}), expected a mapping") from None
    if not isinstance(arguments, Mapping):
        raise BadRequestError(f"{path}: found {type(arguments).__name__}, expected a mapping")
    return dict(arguments)


def checked_tool(tool: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A tool in the ``{"type": "function", "function": …}`` form; names are checked because templates print them.

    Raises:
        BadRequestError: naming what is wrong with it.
    """
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise BadRequestError(f"{path}.function: found {type(function).__name__}, expected a mapping")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequestError(f"{path}.function.name: found {name!r}, expected letters, digits and any of _ . : -")
    parameters = function.get("parameters", {"type": "object", "properties": {}})
    _check_properties(parameters, f"{path}.function.parameters")
    if not isinstance(strict := function.get("strict"), bool | None):
        raise BadRequestError(f"{path}.function.strict: found {strict!r}, expected true or false")
    return {"type": "function", "function": {"description": "", **function, "parameters": parameters}}


def _check_properties(schema: object, path: str) -> None:
    """Property names, all the way down: they are keys, which the escaping of texts does not reach."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if not isinstance(key, str) or "<" in key or len(key) > 128 or not key.isprintable():
                raise BadRequestError(f"{path}: found the name {key!r}, expected at most 128 characters without '<'")
            _check_properties(value, f"{path}.{key}")
    elif isinstance(schema, (list, tuple)):
        for i, value in enumerate(schema):
            _check_properties(value, f"{path}[{i}]")


def _template_arguments(generate: Generate) -> dict[str, Any]:
    taken = sorted(_OWN_ARGUMENTS & set(generate.template_kwargs))
    if taken:
        raise BadRequestError(f"template_kwargs: found {taken[0]!r}, which is not the caller's to set")
    thinking = {} if generate.reasoning is None else {"enable_thinking": generate.reasoning}
    return thinking | generate.template_kwargs


def _apply(
    generate: Generate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    answers: Mapping[int, list[int]],
    model: ModelSpec,
    tokenizer: Tokenizer,
    ends: Collection[int],
) -> Prompt:
    if tools and not shows_tools(tokenizer):
        raise BadRequestError(f"tools: the chat template of {model.id!r} does not show tools; use a model whose does")
    marks, arguments = Marks(tokenizer), _template_arguments(generate)
    keyed = {"messages": [m.get("tool_calls") for m in messages], "tools": tools, "template_kwargs": arguments}
    _check_keys(keyed, marks.tokens, "")
    if "message.thinking" in str(tokenizer.chat_template):
        messages = [_with_thinking(message) for message in messages]
    messages, tools, arguments = marks.mark(messages), marks.mark(tools), marks.mark(arguments)

    def rendered(some: list[dict[str, Any]], asked: bool) -> str:
        how = {"add_generation_prompt": asked, "tokenize": False, **arguments}
        return str(tokenizer.apply_chat_template(some, tools=tools or None, **how))

    def write(count: int, asked: bool) -> str:
        some = messages[:count]
        try:
            return rendered(some, asked)
        except TemplateError:
            if (plainer := _told_by_user(_one_call_each(some))) == some:
                raise
        return rendered(plainer, asked)

    try:
        return continuing.prompt(write, len(messages), answers, marks, ends, stops=bool(generate.stop))
    except Exception as error:
        # Templates raise on what they do not take (roles that do not alternate, unknown roles): the caller's to change
        raise BadRequestError(
            f"messages: the chat template of {model.id!r} refused them: {type(error).__name__}: {error}"
        ) from error


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with one call at most, each in front of its result: the templates of Llama 3 refuse several in one."""
    single: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []  # later calls of the message before
    for message in messages:
        if message["role"] != "tool":
            single += waiting
            waiting = []
        elif waiting and message.get("tool_call_id") == waiting[0]["tool_calls"][0].get("id"):
            single.append(waiting.pop(0))
        calls = message.get("tool_calls") or ()
        single.append({**message, "tool_calls": calls[:1]} if calls else message)
        waiting += [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls[1:]]
    return single + waiting


def _told_by_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which each result belongs to a call: what came of those that could not be read is told by the user.

    The templates of gpt-oss refuse results without a call, those of Mistral answers in a row that have none.
    """
    told: list[dict[str, Any]] = []
    calls = joins = False
    for message in messages:
        if message["role"] == "assistant":
            calls = bool(message.get("tool_calls"))
        stray = message["role"] == "tool" and not calls
        said = {"role": "user", "content": message["content"]} if stray else message
        if joins and said["role"] == "user":
            told[-1] = {**said, "content": f"{told[-1]['content']}\n{said['content']}"}
        else:
            told.append(said)
            joins = stray
    return told


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The templates of gpt-oss have another name for reasoning, and refuse it beside text in a message with calls."""
    reasoning = message.get("reasoning_content")
    others = {key: value for key, value in message.items() if key != "reasoning_content"}
    refused = message.get("tool_calls") and message["content"]
    return others if reasoning is None or refused else {**others, "thinking": reasoning}


def _check_keys(value: object, control: Sequence[str], path: str) -> None:
    """Keys of maps are rendered as they are, so none may hold a control token."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if any(token in str(key) for token in control):
                raise BadRequestError(f"{path or 'request'}: found the key {key!r}, which holds a control token")
            _check_keys(entry, control, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            _check_keys(entry, control, f"{path}[{i}]")
