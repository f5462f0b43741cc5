"""Outputs in the documented format of each family, written for these tests.

What must not be lost stands in Greek letters; markers hold none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "scale": {"enum": ["Γαμμα", "Δελτα"]},
        "exact": {"type": "boolean"},
        "place": {"type": ["object", "null"]},
        "anything": {},
    },
    "required": ["city"],
}
TOOLS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "get_time": {"type": "object", "properties": {}}}
THOUGHT = "Αλφα, then ask\nfor it."


@dataclass(frozen=True)
class Recording:
    """One output and what it means.

    Args:
        name: Of the case.
        text: The output.
        calls: Names and arguments.
        tools: The tool parser's name.
        reasoning: The reasoning parser's name.
        content: The expected content.
        thought: The expected reasoning.
        ids: The expected identifiers, where the model gives them.
        prompt_end: The end of the prompt.
        continued: The assistant's text that is continued.
    """

    name: str
    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    tools: str | None = None
    reasoning: str | None = None
    content: str = ""
    thought: str = ""
    ids: tuple[str, ...] = ()
    prompt_end: str = ""
    continued: str = ""


ONE = (("get_weather", {"city": "Ζητα", "days": 3}),)
TWO = (*ONE, ("get_time", {}))
RICH = (
    (
        "get_weather",
        {
            "city": 'Ητα "<Θ>"\nΙωτα',
            "days": 12,
            "scale": "Γαμμα",
            "exact": True,
            "place": {"λ": [1, None]},
            "anything": 5,
        },
    ),
)
ONE_JSON = '{"city": "Ζητα", "days": 3}'
RICH_JSON = (
    '{"city": "Ητα \\"<Θ>\\"\\nΙωτα", "days": 12, "scale": "Γαμμα", "exact": true, "place": {"λ": [1, null]}, '
    '"anything": 5}'
)
NAMED_ONE = '{"name": "get_weather", "arguments": ' + ONE_JSON + "}"
NAMED_TIME = '{"name": "get_time", "arguments": {}}'
LEAD = "Καππα: let me look.\n\n"
LEAD_TEXT = "Καππα: let me look."

HERMES = [
    Recording("one", f"<tool_call>\n{NAMED_ONE}\n</tool_call>", ONE, "hermes"),
    Recording(
        "two with text",
        f"{LEAD}<tool_call>\n{NAMED_ONE}\n</tool_call>\n<tool_call>\n{NAMED_TIME}\n</tool_call>",
        TWO,
        "hermes",
        content=LEAD_TEXT,
    ),
    Recording(
        "rich, text after",
        '<tool_call>{"arguments": ' + RICH_JSON + ', "name": "get_weather"}</tool_call>\nΜυ done.',
        RICH,
        "hermes",
        content="Μυ done.",
    ),
    Recording(
        "arguments in a string",
        '<tool_call>{"id": 7, "name": "get_weather", '
        '"arguments": "{\\"city\\": \\"Ζητα\\", \\"days\\": 3}"}</tool_call>',
        ONE,
        "hermes",
    ),
    Recording("no arguments", '<tool_call>{"name": "get_time"}</tool_call>', (("get_time", {}),), "hermes"),
    Recording(
        "thought before",
        f"<think>\n{THOUGHT}\n</think>\n\n{LEAD}<tool_call>\n{NAMED_ONE}\n</tool_call>",
        ONE,
        "hermes",
        "think",
        LEAD_TEXT,
        THOUGHT,
    ),
]

QWEN3_CODER = [
    Recording(
        "one",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nΖητα\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        ONE,
        "qwen3_coder",
    ),
    Recording(
        "rich and none",
        f"{LEAD}<tool_call>\n<function=get_weather>\n"
        '<parameter=city>\nΗτα "<Θ>"\nΙωτα\n</parameter>\n<parameter=days>\n12\n</parameter>\n'
        "<parameter=scale>\nΓαμμα\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        "<parameter=place>\n{'λ': [1, None]}\n</parameter>\n<parameter=anything>\n5\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
        (*RICH, ("get_time", {})),
        "qwen3_coder",
        content=LEAD_TEXT,
    ),
    Recording(
        "lines in a text",
        "<function=get_weather>\n<parameter=city>\n\nΝυ\n\n\nΞι\n\n</parameter>\n</function>",
        (("get_weather", {"city": "\nΝυ\n\n\nΞι\n"}),),
        "qwen3_coder",
    ),
]

LLAMA = [
    Recording("one", NAMED_ONE.replace("arguments", "parameters"), ONE, "llama3_json"),
    Recording("two", f"{NAMED_ONE}; {NAMED_TIME}", TWO, "llama3_json"),
    Recording("python tag", f"<|python_tag|>{NAMED_ONE}", ONE, "llama3_json"),
    Recording("typed", '\n{"type": "function", ' + NAMED_ONE[1:], ONE, "llama3_json"),
    Recording("pythonic", "[get_weather(city='Ζητα', days=3), get_time()]", TWO, "pythonic"),
    Recording(
        "pythonic, marked and rich",
        '<|python_start|>[get_weather(city="Ητα \\"<Θ>\\"\\nΙωτα", days=12, scale=\'Γαμμα\', exact=True, '
        'place={"λ": [1, None]}, anything=5)]<|python_end|>',
        RICH,
        "pythonic",
    ),
    Recording(
        "pythonic, three quotes",
        '[get_weather(city="""Ο "π" )\n\'""", anything=(-1.5, []))]',
        (("get_weather", {"city": 'Ο "π" )\n\'', "anything": [-1.5, []]}),),
        "pythonic",
    ),
    Recording("json of Llama 4", NAMED_ONE, ONE, "pythonic"),
]

MISTRAL = [
    Recording("list", f"[TOOL_CALLS] [{NAMED_ONE}, {NAMED_TIME}]", TWO, "mistral"),
    Recording("named", f"[TOOL_CALLS]get_weather[ARGS]{ONE_JSON}[TOOL_CALLS]get_time[ARGS]{{}}", TWO, "mistral"),
    Recording("no marker", f"{LEAD}[TOOL_CALLS]get_weather{RICH_JSON}", RICH, "mistral", content=LEAD_TEXT),
    Recording(
        "with id", f"[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{ONE_JSON}", ONE, "mistral", ids=("abc123XYZ",)
    ),
    Recording(
        "thought",
        f"[THINK]{THOUGHT}[/THINK]Ρω[TOOL_CALLS]get_weather[ARGS]{ONE_JSON}",
        ONE,
        "mistral",
        "mistral",
        "Ρω",
        THOUGHT,
    ),
]

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DEEPSEEK = [
    Recording(
        "v3",
        f"{LEAD}{_CALLS}{_CALL}function{_SEP}get_weather\n```json\n{RICH_JSON}\n```{_CALL_END}\n"
        f"{_CALL}function{_SEP}get_time\n```json\n{{}}\n```{_CALL_END}{_CALLS_END}",
        (*RICH, ("get_time", {})),
        "deepseek_v3",
        content=LEAD_TEXT,
    ),
    Recording(
        "v3.1",
        f"{_CALLS}{_CALL}get_weather{_SEP}{ONE_JSON}{_CALL_END}{_CALL}get_time{_SEP}{{}}{_CALL_END}{_CALLS_END}",
        TWO,
        "deepseek_v3",
    ),
    Recording(
        "r1, opened by the prompt",
        f"{THOUGHT}\n</think>\n\nΣιγμα{_CALLS}{_CALL}function{_SEP}get_weather\n```json\n{ONE_JSON}\n```{_CALL_END}",
        ONE,
        "deepseek_v3",
        "think",
        "Σιγμα",
        THOUGHT,
        prompt_end="<｜Assistant｜><think>\n",
    ),
]

HARMONY = [
    Recording(
        "answer",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Ταυ = 4.<|return|>",
        (),
        None,
        "harmony",
        "Ταυ = 4.",
        THOUGHT,
        prompt_end="<|end|><|start|>assistant",
    ),
    Recording(
        "call",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{ONE_JSON}<|call|>",
        ONE,
        "harmony",
        "harmony",
        "",
        THOUGHT,
    ),
    Recording(
        "recipient in the role, words before",
        "<|channel|>commentary<|message|>Υψ: first this.<|end|><|start|>assistant to=functions.get_weather<|channel|>"
        f"commentary<|message|>{RICH_JSON}<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.get_time<|message|>",
        (*RICH, ("get_time", {})),
        "harmony",
        "harmony",
        "Υψ: first this.",
    ),
    Recording(
        "recipient first",
        f" to=functions.get_weather<|channel|>commentary json<|message|>{ONE_JSON}",
        ONE,
        "harmony",
        "harmony",
    ),
    Recording(
        "two thoughts and two texts",
        "<|channel|>analysis<|message|>Φι<|end|><|start|>assistant<|channel|>analysis<|message|>Χι<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Ψι<|end|><|start|>assistant<|channel|>final<|message|>Ωμ",
        (),
        None,
        "harmony",
        "Ψι\nΩμ",
        "Φι\nΧι",
    ),
    Recording("plain text", "Φι and <b>Χι</b>", (), None, "harmony", "Φι and <b>Χι</b>"),
    Recording(
        "continued",
        "Ψι.",
        (),
        None,
        "harmony",
        "Ψι.",
        prompt_end="<|start|>assistant<|channel|>final<|message|>It is ",
        continued="It is ",
    ),
]

GLM = [
    Recording(
        "4.5",
        f"{LEAD}<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Ζητα</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>get_time\n</tool_call>",
        TWO,
        "glm45",
        content=LEAD_TEXT,
    ),
    Recording(
        "4.7",
        '<tool_call>get_weather<arg_key>city</arg_key><arg_value>Ητα "<Θ>"\nΙωτα</arg_value><arg_key>days</arg_key>'
        "<arg_value>12</arg_value><arg_key>scale</arg_key><arg_value>Γαμμα</arg_value><arg_key>exact</arg_key>"
        '<arg_value>true</arg_value><arg_key>place</arg_key><arg_value>{"λ": [1, null]}</arg_value>'
        "<arg_key>anything</arg_key><arg_value>5</arg_value></tool_call>",
        RICH,
        "glm45",
    ),
    Recording(
        "thought",
        f"\n<think>{THOUGHT}</think>\nΑ<tool_call>get_time</tool_call>",
        (("get_time", {}),),
        "glm45",
        "think",
        "Α",
        THOUGHT,
    ),
]

KIMI = [
    Recording(
        "two",
        f"{LEAD}<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{ONE_JSON}<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{{}}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        TWO,
        "kimi_k2",
        content=LEAD_TEXT,
        ids=("functions.get_weather:0", "functions.get_time:1"),
    ),
    Recording(
        "thought",
        f"◁think▷{THOUGHT}◁/think▷<|tool_call_begin|>get_weather:0<|tool_call_argument_begin|> {RICH_JSON}",
        RICH,
        "kimi_k2",
        "think",
        "",
        THOUGHT,
    ),
]

GRANITE = [
    Recording("list", f"<|tool_call|>[{NAMED_ONE}, {NAMED_TIME}]", TWO, "granite"),
    Recording("tags", f"<tool_call>[{NAMED_ONE}]</tool_call>", ONE, "granite"),
    Recording("20b", f"<function_call> {NAMED_ONE}\n<function_call> {NAMED_TIME}", TWO, "granite"),
    Recording(
        "3.2 thought",
        f"Here is my thought process:\n\n{THOUGHT}\n\nHere is my response:\n\nΑ <b>",
        (),
        None,
        "granite",
        "Α <b>",
        THOUGHT,
    ),
    Recording(
        "3.3 thought",
        f"<think>{THOUGHT}</think>\n<response>Α\nΒ\n</response>",
        (),
        None,
        "granite",
        "Α\nΒ",
        THOUGHT,
    ),
]

OTHERS = [
    Recording("fence", "```tool_code\nprint(get_weather(city='Ζητα', days=3))\n```", ONE, "gemma"),
    Recording("list", "[get_weather(city='Ζητα', days=3), get_time()]", TWO, "gemma"),
    Recording("json fence", f"{LEAD}```json\n{NAMED_ONE}\n```\nΒ", ONE, "gemma", content=f"{LEAD_TEXT}Β"),
    Recording(
        "functiongemma",
        '<start_function_call>call:get_weather{city:<escape>Ητα "<Θ>"\nΙωτα<escape>,days:12,scale:<escape>Γαμμα'
        "<escape>,exact:true,place:{λ:[1,null]},anything:5}<end_function_call><start_function_call>call:get_time{}"
        "<end_function_call>",
        (*RICH, ("get_time", {})),
        "functiongemma",
    ),
    Recording("phi", f"functools[{NAMED_ONE}, {NAMED_TIME}]", TWO, "phi4_mini"),
    Recording("phi tokens", f"{LEAD}<|tool_call|>[{NAMED_ONE}]<|/tool_call|>", ONE, "phi4_mini", content=LEAD_TEXT),
    Recording("object", NAMED_ONE.replace("arguments", "parameters"), ONE, "json"),
    Recording("objects", f"\n [{NAMED_ONE},\n {NAMED_TIME}]", TWO, "json"),
    Recording("fence", f"```json\n[{NAMED_ONE}]\n```", ONE, "json"),
    Recording(
        "nested function",
        '{"type": "function", "function": ' + NAMED_ONE + "}",
        ONE,
        "json",
    ),
    Recording("think", f"<think>{THOUGHT}</think>Β", (), None, "think", "Β", THOUGHT),
    Recording("think of the prompt", f"{THOUGHT}</think>Β", (), None, "think", "Β", THOUGHT, prompt_end="<think>\n"),
    Recording("no think", "\n\nΒ ", (), None, "think", "\n\nΒ ", prompt_end="<think>\n\n</think>\n\n"),
    Recording("think continued", f"{THOUGHT}</think>Β", (), None, "think", "Β", THOUGHT, continued="<think>Well, "),
]

ALL: dict[str, Recording] = {
    f"{recording.tools or recording.reasoning}: {recording.name}": recording
    for group in (HERMES, QWEN3_CODER, LLAMA, MISTRAL, DEEPSEEK, HARMONY, GLM, KIMI, GRANITE, OTHERS)
    for recording in group
}
