"""Chat templates run in a sandbox of their own: the names that transformers gives them, and an end to time and memory.

A template is a program of the model folder over data of the client. `BoundedTemplate.render` ends with a TemplateError
or with whatever the template's own operations raise; it stops after a number of seconds of processor time and at a
number of characters. How: every `for` and every call looks at the clock, and operations that make a large text or list
out of small ones (`*`, `+`, `~`, `join`, `replace`, `indent`, ...) are measured before they run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from max_ray.tokenization.template_limits import (
    LONG_NUMBER,
    MAX_WIDTH,
    TEXT_FILTERS,
    WIDTH_FILTERS,
    Budget,
    TemplateLimitError,
    check_filter,
    check_format,
    check_method,
    check_product,
)

_LOOP, _EMIT, _CONCAT, _ADD = "bounded_loop", "bounded_emit", "bounded_concat", "bounded_add"


class BoundedTemplate:
    """A compiled template. Raises TemplateSyntaxError for text that is none.

    `constants`: the strings of its expressions; `variables`: the names that it reads and does not set.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Sandbox()
        tree = self._environment.parse(source)
        self.constants = frozenset(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        bounded = _Bounds().visit(tree)
        code = self._environment.compile(bounded)
        self._template = Template.from_code(self._environment, code, self._environment.make_globals(None))

    def render(self, variables: Mapping[str, Any], *, seconds: float, characters: int) -> str:
        """The text. Raises TemplateTimeError, TemplateLimitError, and whatever the template raises.

        seconds: of processor time of this thread. characters: of the text, and of every text on the way.
        """
        budget = self._environment.budget = Budget(seconds, characters)
        pieces, total = [], 0
        for piece in self._template.generate(dict(variables)):
            pieces.append(piece)
            total += len(piece)
            if total > characters:
                budget.check(total)
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment. One template each; its threads have budgets of their own."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        self._local = threading.local()
        extensions = [_GenerationTag, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._finalize)
        self.filters["tojson"] = _to_json
        for name in TEXT_FILTERS | WIDTH_FILTERS:
            self.filters[name] = self._bounded_filter(name, self.filters[name])
        self.filters |= {_LOOP: _loop, _EMIT: _emit, _CONCAT: _concat, _ADD: _add}
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}
        del self.globals["lipsum"]

    @property
    def budget(self) -> Budget:
        """The budget of the rendering in this thread; a small one while a template is compiled."""
        budget: Budget | None = getattr(self._local, "budget", None)
        return budget if budget is not None else Budget(1.0, MAX_WIDTH)

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._local.budget = budget

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.tick()
        if operator == "%":
            check_format(budget, left, (right,))
        else:
            check_product(budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = check_method(budget, owner, __obj.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        @wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> str:
            check_format(self.budget, text, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return bounded

    def _finalize(self, value: Any) -> Any:
        """What each expression of the output goes through."""
        if isinstance(value, (list, tuple, Mapping)):
            self.budget.weigh(value)
        return value

    def _bounded_filter(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(original, "jinja_pass_arg") else 0  # the context or the environment comes first

        @wraps(original)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value, *options = args[skipped:]
            if isinstance(value, str) and not options and not kwargs:
                return original(*args)
            budget = self.budget
            budget.tick()
            if name == "join":
                value = list(value)
            check_filter(budget, name, value, [*options, *kwargs.values()])
            return original(*args[:skipped], value, *options, **kwargs)

        return bounded


class _Loop:
    """The items of a `for`, counted; sized where they are."""

    __slots__ = ("_budget", "_items")

    def __init__(self, items: Iterable[Any], budget: Budget) -> None:
        self._items, self._budget = items, budget

    def __iter__(self) -> Iterator[Any]:
        tick = self._budget.tick
        for item in self._items:
            tick()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # jinja catches the TypeError of what has no length


@pass_context
def _loop(context: Context, items: Iterable[Any]) -> _Loop:
    return _Loop(items, _budget_of(context))


@pass_context
def _emit(context: Context, text: str) -> str:
    _budget_of(context).buffer(len(text))
    return text


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    budget = _budget_of(context)
    budget.tick()
    budget.weigh(*values)
    return "".join(map(str, values))


@pass_context
def _add(context: Context, values: list[Any]) -> Any:
    left, right = values
    budget = _budget_of(context)
    budget.tick()
    if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        budget.check(len(left) + len(right))
    return left + right


def _budget_of(context: Context) -> Budget:
    environment = context.environment
    assert isinstance(environment, _Sandbox)
    return environment.budget


class _Bounds(NodeTransformer):
    """Puts the measured operations into a template's tree."""

    def __init__(self) -> None:
        self._depth = 0  # of blocks whose text does not come out of `generate` piece by piece

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """A constant makes a text longer by itself only: the time is over before there is too much of it."""
        is_bound = isinstance(node.left, nodes.Const) or isinstance(node.right, nodes.Const)
        self.generic_visit(node)
        return node if is_bound else _filter(nodes.List([node.left, node.right], lineno=node.lineno), _ADD)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        if self._depth:
            parts = [
                nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part
                for part in node.nodes
            ]
            node.nodes = [_filter(_filter(part, "string"), _EMIT) for part in parts]
        return node

    def _visit_buffered(self, node: nodes.Node) -> nodes.Node:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        return node

    visit_Macro = visit_CallBlock = visit_FilterBlock = visit_AssignBlock = _visit_buffered


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` in templates, without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` in templates. Raises TemplateError for names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_attribute(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace has no attribute {name!r}")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if LONG_NUMBER.search(form):
        raise TemplateLimitError("it asks for too wide a date")
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
