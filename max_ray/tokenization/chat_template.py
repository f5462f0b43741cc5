"""The chat template of a model: what it knows, which messages it can write, and their text.

What a template does with a role, a name, tools or parts is found by rendering short conversations with it, once. A
message that it would leave out is refused by name; it is never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError

from max_ray.errors import InputError
from max_ray.tokenization.message_forms import CALL_FORMS, CallForm, probe_chat, until_mark, with_calls, with_mark
from max_ray.tokenization.template_limits import TemplateLimitError, TemplateTimeError
from max_ray.tokenization.template_sandbox import BoundedTemplate

Chat = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
RENDER_SECONDS, INLINE_SECONDS, _PROBE_SECONDS = 5.0, 0.02, 0.25
MAX_CHARACTERS = 16 * 2**20
_IMAGE_PARTS = ("image_url", "image", "input_image")
_NO_VISION = "This model takes text only and cannot see images: leave them out, or serve a vision-language model."
_LONGEST_REASON = 500
_LONGEST_ROLE = 64
_CHARACTERS_A_FIELD = 8  # what a field costs besides its text
_OPTIONS = frozenset(["add_generation_prompt", "tools", "documents", "continue_final_message"])
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TOOL = {
    "type": "function",
    "function": {
        "name": "zqtool",
        "description": "zqdescription",
        "parameters": {
            "type": "object",
            "properties": {"zqkey": {"type": "string", "description": "zqvalue"}},
            "required": ["zqkey"],
        },
    },
}


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template writes into the prompt.

    roles: whose messages it writes; `developer` is among them where it is sent as `system`. refusals: why it writes no
    message of another role. names: roles whose `name` it writes. content: "string", "list" (of typed parts), or
    "both". system: where system messages may stand: "anywhere", "first" (one only), or "none". tools: whether it
    describes tools; call_form: how it wants the calls of the assistant, None where it writes none. turns: text around
    a user's and a system message. is_known: False where it writes no plain user message, so that nothing can be said.
    """

    is_known: bool
    roles: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    content: str = "string"
    system: str = "none"
    tools: bool = False
    call_form: CallForm | None = None
    developer_is_system: bool = False
    turns: str = ""

    @property
    def tool_calls(self) -> bool:
        """Whether it writes the calls of the assistant."""
        return self.call_form is not None

    def public(self) -> dict[str, Any]:
        """For `GET /v1/models/{id}`."""
        return {
            "roles": list(self.roles),
            "names": list(self.names),
            "content": self.content,
            "system": self.system,
            "tools": self.tools,
            "tool_calls": self.tool_calls,
        }


class ChatTemplate:
    """A template with the tokens' names that it may use. Nothing is compiled before it is needed.

    source: the text, or texts by name ("default", "tool_use"). special_tokens: variables such as `bos_token`.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, Any]) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens)
        self._other_roles = lru_cache(maxsize=64)(self._writes_role)

    @cached_property
    def facts(self) -> TemplateFacts:
        """What it knows: a dozen short renderings, the first time."""
        return _Probe(self).facts()

    @cached_property
    def constants(self) -> frozenset[str]:
        """All strings in its expressions; none of a template that cannot be compiled."""
        try:
            return frozenset[str]().union(*(template.constants for template in self._templates.values()))
        except InputError:
            return frozenset()

    def render(self, chat: Chat, options: Mapping[str, Any], seconds: float = RENDER_SECONDS) -> str:
        """The text for messages that `prepare` gave. seconds: of processor time.

        Raises InputError for whatever the template raises, TemplateTimeError where it takes longer.
        """
        options = dict(options)
        if options.pop("continue_final_message", False):
            return until_mark(self.render(with_mark(chat), options, seconds))
        template = self._compiled("tool_use" if options.get("tools") and "tool_use" in self._sources else "default")
        variables: dict[str, Any] = {"messages": [_message(m) for m in chat], "tools": None, "documents": None}
        variables |= {"add_generation_prompt": False, **self._special_tokens, **options}
        try:
            return template.render(variables, seconds=seconds, characters=MAX_CHARACTERS)
        except TemplateTimeError as error:
            if seconds < RENDER_SECONDS:
                raise
            raise InputError(
                f"The chat template does too much with these messages: {error}.", param="messages"
            ) from error
        except TemplateError as error:
            verb = "does too much with" if isinstance(error, TemplateLimitError) else "refuses"
            raise InputError(f"The chat template {verb} these messages: {_reason(error)}", param="messages") from error
        except Exception as error:  # a template may raise anything, and only it runs here
            reason = f"{type(error).__name__}: {_reason(error)}"
            raise InputError(f"The chat template fails on these messages: {reason}", param="messages") from error

    def prepare(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The messages with the roles that the template knows. Raises InputError, with `messages[i].role` or the like,
        where it would leave something out."""
        facts = self.facts
        if not facts.is_known:
            return list(messages)
        chat = []
        for index, message in enumerate(messages):
            role = message.get("role")
            if role == "developer" and facts.developer_is_system:
                message = {**message, "role": "system"}
            elif role not in facts.roles:
                self._check_role(role, index)
            if message["role"] == "system" and index and facts.system == "first":
                raise InputError(
                    f"This model's chat template takes one system message, as the first of all, and messages[{index}] "
                    f"is another. Put them together.",
                    param=f"messages[{index}].role",
                )
            self._check_fields(message, index)
            calls = message.get("tool_calls") if facts.call_form is not None else None
            chat.append(with_calls(message, calls, facts.call_form) if calls and facts.call_form else message)
        return chat

    @property
    def source(self) -> str:
        """Its text; several templates are joined."""
        return "\n".join(self._sources.values())

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that its expressions read."""
        return frozenset[str]().union(*(template.variables for template in self._templates.values()))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InputError for options that the template does not read."""
        variables = self.variables
        for name in options:
            if name not in variables and name not in _OPTIONS:
                raise InputError(f"The chat template reads no option {name!r}.", param="chat_template_options")
        if options.get("tools") and self.facts.is_known and not self.facts.tools:
            raise InputError("This model's chat template writes no tools. Leave them out.", param="tools")
        if options.get("documents") and "documents" not in variables:
            raise InputError("This model's chat template writes no documents.", param="documents")

    def _check_role(self, role: Any, index: int) -> None:
        is_word = isinstance(role, str) and len(role) <= _LONGEST_ROLE
        reason = "A role is a short word." if not is_word else self.facts.refusals.get(role)
        if reason is None:
            reason = self._other_roles(role)
        if reason:
            raise InputError(
                f"This model's chat template writes no message of the role {_short(str(role))!r}: {reason} "
                f"It knows {', '.join(self.facts.roles)}.",
                param=f"messages[{index}].role",
            )

    def _check_fields(self, message: Mapping[str, Any], index: int) -> None:
        role, facts = message["role"], self.facts
        if message.get("name") and role in ROLES and role != "tool" and role not in facts.names:
            raise InputError(
                f"This model's chat template does not write the name of a message of the role {role!r}. Leave it out, "
                f"or write it into the content.",
                param=f"messages[{index}].name",
            )
        if message.get("tool_calls") and not facts.tool_calls:
            raise InputError("This model's chat template writes no tool calls.", param=f"messages[{index}].tool_calls")

    def _writes_role(self, role: str) -> str:
        """Why a message of a role that is not of ROLES is not written; empty where it is."""
        return _Probe(self).refusal([{"role": role, "content": "zqother"}, _USER], ["zqother"])

    def _compiled(self, name: str) -> BoundedTemplate:
        if name not in self._sources:
            raise InputError(
                f"This model has several chat templates and none is the default: {sorted(self._sources)}.",
                param="messages",
            )
        return self._templates[name]

    @cached_property
    def _templates(self) -> dict[str, BoundedTemplate]:
        try:
            return {name: BoundedTemplate(source) for name, source in self._sources.items()}
        except Exception as error:  # jinja and Python raise many kinds for a text that is no template
            raise InputError(f"The model's chat template cannot be read: {_reason(error)}", param="messages") from error


_USER = {"role": "user", "content": "zquser"}
_ANSWER = {"role": "assistant", "content": "zqanswer"}


class _Probe:
    """Renders short conversations with a template and looks for their words in the text."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._wrap = False

    def facts(self) -> TemplateFacts:
        as_text = self._writes([_USER], "zquser")
        listed = self._text([{"role": "user", "content": _parts("zquser")}])
        as_list = listed is not None and "zquser" in listed and "'text'" not in listed
        self._wrap = as_list and not as_text
        if not (as_text or as_list):
            return TemplateFacts(is_known=False)
        content = "both" if as_text and as_list else "list" if as_list else "string"
        refusals = {role: reason for role in ROLES if (reason := self._role_refusal(role))}
        system = "none" if "system" in refusals else "anywhere" if self._takes_many_systems() else "first"
        as_system = "system" not in refusals and ("developer" in refusals or self._is_verbatim("developer"))
        if as_system:
            refusals.pop("developer", None)
        roles = tuple(role for role in ROLES if role not in refusals)
        return TemplateFacts(
            is_known=True,
            roles=roles,
            refusals=refusals,
            names=tuple(role for role in roles if role != "tool" and self._writes_name(role, as_system)),
            content=content,
            system=system,
            tools=self._writes([_USER], "zqtool", tools=[_TOOL]),
            call_form=self._call_form(),
            developer_is_system=as_system,
            turns=(self._text([_USER]) or "") + (self._text([{"role": "system", "content": "zqsystem"}, _USER]) or ""),
        )

    def refusal(self, chat: Chat, words: Sequence[str], **options: Any) -> str:
        """Why not all words are in the text; empty where they are."""
        try:
            text = self._render(chat, options)
        except (InputError, TemplateTimeError) as error:
            return f"it says {_reason(error.__cause__ or error)!r}."
        return "" if all(word in text for word in words) else "it leaves it out."

    def _role_refusal(self, role: str) -> str:
        if role == "tool":
            return self._call_refusal("zqresult")
        if role == "user":
            return self.refusal([{"role": "user", "content": "zqrole"}], ["zqrole"])
        if role == "assistant":
            return self.refusal([_USER, _ANSWER, _USER], ["zqanswer"])
        return self.refusal([{"role": role, "content": "zqrole"}, _USER], ["zqrole", "zquser"])

    def _call_form(self) -> CallForm | None:
        """The first form of a tool's call that it writes."""
        words = ["zqfunction", "zqargument"]
        return next((form for form in CALL_FORMS if not self.refusal(probe_chat(form), words)), None)

    def _call_refusal(self, word: str) -> str:
        """Why the word is not in the text of a tool's call and its result, in any form."""
        refusals = [self.refusal(probe_chat(form), [word]) for form in CALL_FORMS]
        return refusals[1] if all(refusals) else ""

    def _takes_many_systems(self) -> bool:
        first, second = ({"role": "system", "content": word} for word in ("zqfirst", "zqsecond"))
        return not self.refusal([first, _USER, _ANSWER, second, _USER], ["zqfirst", "zqsecond", "zquser", "zqanswer"])

    def _is_verbatim(self, role: str) -> bool:
        """Whether the template writes any role as it is given, this one too: it has no branch for it."""
        given, invented = (self._text([{"role": r, "content": "zqrole"}, _USER]) for r in (role, "zqinvented"))
        return given is not None and invented is not None and invented.replace("zqinvented", role) == given

    def _writes_name(self, role: str, as_system: bool) -> bool:
        written = "system" if role == "developer" and as_system else role
        named = {"role": written, "content": "zqrole", "name": "zqname"}
        chat = [_USER, named, _USER] if role == "assistant" else [named] if role == "user" else [named, _USER]
        return self._writes(chat, "zqname")

    def _writes(self, chat: Chat, word: str, **options: Any) -> bool:
        return not self.refusal(chat, [word], **options)

    def _text(self, chat: Chat) -> str | None:
        try:
            return self._render(chat, {})
        except (InputError, TemplateTimeError):
            return None

    def _render(self, chat: Chat, options: Mapping[str, Any]) -> str:
        shaped = [{**m, "content": _parts(m["content"])} if self._wrap and "content" in m else m for m in chat]
        return self._template.render(shaped, options, seconds=_PROBE_SECONDS)


def is_short(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None, num_characters: int) -> bool:
    """Whether messages and options are few and small, all together. Looks at no more than that many of them."""
    left = num_characters
    stack: list[Any] = [messages, options]
    while stack and left >= 0:
        value = stack.pop()
        if isinstance(value, str):
            left -= len(value)
            continue
        left -= _CHARACTERS_A_FIELD
        if isinstance(value, (Mapping, Sequence)):
            left -= len(value)
            if left >= 0:
                stack += value.values() if isinstance(value, Mapping) else value
    return left >= 0


def texts_of(content: Any) -> Iterator[str]:
    """The texts in a message's content: itself, or those of its parts."""
    for part in [content] if isinstance(content, str) else content or ():
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            yield text


def shape_content(content: Any, wrap: bool) -> Any:
    """Message content as the template wants it: one string, or a list of typed parts. Raises InputError."""
    if isinstance(content, str):
        return _parts(content) if wrap else content
    if content is None:
        return content
    texts = [_part_text(part) for part in content]
    return [{"type": "text", "text": text} for text in texts] if wrap else "\n".join(texts)


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS:
        raise InputError(_NO_VISION, param="messages")
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(
            'Message content must be a string or a list of {"type": "text", "text": ...}.', param="messages"
        )
    return str(part["text"])


def _parts(text: Any) -> Any:
    return [{"type": "text", "text": text}] if isinstance(text, str) else text


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for the template: without what is None, and its reasoning by the names that templates read."""
    given = {
        key: value
        for key, value in message.items()
        if value is not None or (key == "content" and "tool_calls" in message)
    }
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _reason(error: BaseException) -> str:
    return _short(str(error))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
