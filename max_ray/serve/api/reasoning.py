"""Reasoning before a grammar, and budgets of it: what a chat request asks the sampler for, once its prompt is known."""

from __future__ import annotations

from dataclasses import replace

from max_ray.errors import InputError
from max_ray.interfaces import GrammarSpec, TextContext
from max_ray.output_parsers import REASONING_PARSERS, ParserInput
from max_ray.output_parsers.reasoning import ReasoningParser
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.openai import GenerationJob
from max_ray.serve.api.parsed_choice import end_of_prompt
from max_ray.serve.api.tool_fields import ChatOutput
from max_ray.structured_output import Reasoning
from max_ray.tokenization.tokenizer import TextTokenizer

BUDGET = "thinking_token_budget"


def set_reasoning(context: TextContext, engine: Engine, job: GenerationJob) -> None:
    """Lets the model reason before a grammar that it has to follow, and bounds the reasoning.

    Args:
        context: Of a choice; its sampling parameters are changed where there is anything to do.
        engine: Serves the model.
        job: The request.

    Raises:
        InputError: A budget is asked for, and this model's reasoning has no markers that could end it.
    """
    chat, grammar = job.chat, context.sampling_params.structured_output
    if chat is None or (grammar is None and chat.thinking_budget is None):
        return
    parser = REASONING_PARSERS.get(engine.parsers.reasoning or "")
    if parser is None or not issubclass(parser, ReasoningParser):
        if chat.thinking_budget is not None:
            raise InputError(
                "This server knows no markers around this model's reasoning, so it cannot bound it. Leave the budget "
                "out.",
                param=BUDGET,
            )
        return
    if chat.thinking_budget is None and not (chat.separates_reasoning and _is_of_the_answer(chat, grammar)):
        return
    given = ParserInput(prompt_end=end_of_prompt(context, engine.tokenizer, chat), continued=chat.continued)
    place = parser.place_of(given)
    if place == "behind":
        return
    opener, closer = _markers(parser, given, engine.tokenizer)
    reasoning = Reasoning(opener, closer, place == "inside", chat.thinking_budget, grammar)
    context.sampling_params = replace(context.sampling_params, structured_output=reasoning.spec())


def _is_of_the_answer(chat: ChatOutput, grammar: GrammarSpec | None) -> bool:
    """Whether a grammar is that of the whole answer. Without a budget a forced call is made at once; tags stand in free
    text."""
    return grammar is not None and grammar.kind != "structural_tag" and not chat.is_forced


def _markers(parser: type[ReasoningParser], given: ParserInput, tokenizer: TextTokenizer) -> tuple[str, str]:
    """The markers that the prompt uses, else those that are tokens, else those that the template has."""
    pairs = list(zip(parser.openers, parser.closers, strict=True))
    text = given.continued or given.prompt_end
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    used = max(pairs, key=lambda pair: text.rfind(pair[0]))
    if used[0] in text:
        return used
    as_tokens = [pair for pair in pairs if all(tokenizer.token_id(marker) is not None for marker in pair)]
    in_template = [pair for pair in pairs if pair[0] in template or pair[1] in template]
    return [*as_tokens, *in_template, *pairs][0]
