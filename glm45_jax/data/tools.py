"""Tools for trajectories of agents: real functions, or tools that a model plays.

A `Toolbox` is a value that knows its tools and opens a `Session`; calls of a session see what those
before them changed. `Functions` runs functions of Python's library, `Played` has an endpoint answer
for tools that exist only as a description, `invented` has one think of such tools; a database is in
`data/tables.py`. What a model writes is an argument, never code: functions are listed by name.
Source: spec 7.1.5 (1); which tools GLM-4.5 used is not published.
"""

import importlib
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from jsonschema import Draft202012Validator, SchemaError

from glm45_jax.data.embed import Lexical
from glm45_jax.data.endpoint import Answers, Body, Decoding, Endpoint, json_lines
from glm45_jax.data.semdedup import kmeans

MOST_ARGUMENTS = 4000  # characters of a call's arguments, as JSON
MOST_RESULT = 2000  # characters of a result; a longer one is cut, and says so


INVENT = """\
Think of {most} tools that software for this purpose would offer to an assistant: {theme}

Each is a function with named arguments. Write one JSON object a line and nothing else:
{"name": "...", "description": "...", "parameters": {"type": "object", "properties": {...}, \
"required": [...]}}"""

PLAY = """\
You stand in for a program with these functions:
{tools}

Calls so far, with what they gave:
{before}

Now this call arrives:
{call}

Answer with what the program returns, as JSON and nothing else. Stay consistent with what it gave \
before. A call that such a program would refuse gives {"error": "..."}."""


@dataclass(frozen=True)
class Tool:
    """A function that can be called. parameters: the JSON schema of its arguments, as JSON.

    Raises: ValueError for a schema that is none, or refers to another place.
    """

    name: str
    description: str
    parameters: str

    def __post_init__(self):
        try:
            schema = json.loads(self.parameters)
            Draft202012Validator.check_schema(schema)
        except (ValueError, SchemaError) as error:
            raise ValueError(
                f"tool {self.name!r}: parameters are no JSON schema: {error}"
            ) from None
        if not isinstance(schema, dict) or schema.get("type") != "object":
            raise ValueError(f"tool {self.name!r}: its schema is {schema}; give an object's")
        for word in ('"$ref"', '"$dynamicRef"', '"pattern'):  # fetched; may never end
            if word in self.parameters:
                raise ValueError(f"tool {self.name!r}: its schema says {word}; write it without")

    def function(self) -> dict[str, Any]:
        """As an OpenAI request lists it."""
        about = {"name": self.name, "description": self.description}
        return {"type": "function", "function": about | {"parameters": json.loads(self.parameters)}}

    def wrong(self, arguments: Any) -> str:
        """What is wrong with arguments of a call; "" where nothing is."""
        size = len(json.dumps(arguments, ensure_ascii=False))
        if size > MOST_ARGUMENTS:
            return f"{size} characters of arguments, {MOST_ARGUMENTS} at most"
        found = next(_validator(self.parameters).iter_errors(arguments), None)
        return "" if found is None else f"{'/'.join(map(str, found.path))} {found.message}"[:200]


class Session(Protocol):
    """Tools in one state. Not for several threads."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str | Body:
        """The result as text, or the request whose answer is the result (then `note` follows).

        The call has passed `Tool.wrong`. An error of the tool is a result that says so.
        """
        ...

    def note(self, result: str) -> None:
        """Told the result that a request gave."""
        ...

    def state(self) -> str:
        """A digest of what the calls changed; "" for tools that change nothing or have no state
        that could be compared.
        """
        ...

    def close(self) -> None:
        """Gives up what it holds."""
        ...


class Toolbox(Protocol):
    """A value that knows tools and opens sessions of them."""

    def tools(self) -> tuple[Tool, ...]:
        """Always the same, in the same order."""
        ...

    def open(self) -> Session:
        """The tools in their first state."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the same calls always give the same results, so that a plan can be checked."""
        ...

    def about(self) -> str:
        """What a writer of tasks must know besides the tools; "" for nothing."""
        ...

    def version(self) -> str:
        """What its results depend on besides the fields."""
        ...


@dataclass(frozen=True)
class Function:
    """A function of an installed package. arguments: (name, JSON type or "array of TYPE")."""

    path: str  # "statistics.median"
    arguments: tuple[tuple[str, str], ...]

    def tool(self) -> Tool:
        """Its name with underscores, the first paragraph of its docstring, its arguments."""
        text = inspect.getdoc(self.find()) or ""
        properties = {name: _schema(kind) for name, kind in self.arguments}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        schema["required"] = list(properties)
        schema["additionalProperties"] = False
        about = " ".join(text.split("\n\n")[0].split())
        return Tool(self.path.replace(".", "_"), about, json.dumps(schema))

    def find(self) -> Any:
        """The function itself."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _one(path: str, **arguments: str) -> Function:
    return Function(path, tuple(arguments.items()))


# Functions that no argument of MOST_ARGUMENTS characters makes slow or large.
LIBRARY = (
    _one("statistics.mean", data="array of number"),
    _one("statistics.median", data="array of number"),
    _one("statistics.pstdev", data="array of number"),
    _one("statistics.mode", data="array of string"),
    _one("statistics.correlation", x="array of number", y="array of number"),
    _one("math.gcd", a="integer", b="integer"),
    _one("math.lcm", a="integer", b="integer"),
    _one("math.isqrt", n="integer"),
    _one("math.dist", p="array of number", q="array of number"),
    _one("math.radians", x="number"),
    _one("math.degrees", x="number"),
    _one("math.log2", x="number"),
    _one("calendar.isleap", year="integer"),
    _one("calendar.weekday", year="integer", month="integer", day="integer"),
    _one("calendar.monthrange", year="integer", month="integer"),
    _one("math.atan2", y="number", x="number"),
    _one("unicodedata.name", character="string"),
    _one("unicodedata.category", character="string"),
    _one("html.unescape", text="string"),
    _one("html.escape", text="string"),
    _one("urllib.parse.urlsplit", url="string"),
    _one("urllib.parse.quote", text="string"),
    _one("urllib.parse.parse_qsl", query="string"),
    _one("shlex.split", text="string"),
    _one("string.capwords", text="string"),
    _one("textwrap.dedent", text="string"),
    _one("bisect.bisect_left", sorted_values="array of number", value="number"),
    _one("keyword.iskeyword", text="string"),
    _one("difflib.get_close_matches", word="string", possibilities="array of string"),
)


@dataclass(frozen=True)
class Functions:
    """Functions of Python's library; they change nothing."""

    functions: tuple[Function, ...] = LIBRARY

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    def tools(self) -> tuple[Tool, ...]:
        """One a function."""
        return _tools_of(self.functions)

    def open(self) -> Session:
        """The functions."""
        return _Calls({f.path.replace(".", "_"): f for f in self.functions})

    def about(self) -> str:
        """Nothing."""
        return ""

    def version(self) -> str:
        """Of Python, whose library it is."""
        import platform

        return f"python=={platform.python_version()}"


# Raised over arguments that a function does not take; AttributeError: statistics of infinities.
_REFUSALS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class _Calls:
    def __init__(self, functions: Mapping[str, Function]):
        self._functions = functions

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        function = self._functions[name]
        values = [arguments[argument] for argument, _ in function.arguments]
        try:
            return shown(function.find()(*values))
        except _REFUSALS as error:
            return shown({"error": f"{type(error).__name__}: {error}"})

    def note(self, result: str) -> None:
        raise AssertionError("results of functions need no request")

    def state(self) -> str:
        return ""

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Played:
    """Tools that are only described; the endpoint of the trajectories plays them."""

    described: tuple[Tool, ...]
    prompt: str = PLAY
    decoding: Decoding = Decoding(temperature=0.0, max_tokens=512)

    @property
    def exact(self) -> bool:
        """Never."""
        return False

    def tools(self) -> tuple[Tool, ...]:
        """Those described."""
        return self.described

    def open(self) -> Session:
        """Before any call."""
        return _Play(self)

    def about(self) -> str:
        """Nothing: who plays makes it up."""
        return ""

    def version(self) -> str:
        """Nothing besides the fields."""
        return ""


class _Play:
    def __init__(self, box: Played):
        self._box = box
        self._calls: list[str] = []
        self._tools = "\n".join(json.dumps(tool.function()["function"]) for tool in box.described)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Body:
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        before = "\n".join(self._calls) or "none"
        prompt = self._box.prompt.replace("{tools}", self._tools)
        prompt = prompt.replace("{before}", before).replace("{call}", call)
        self._calls.append(call)
        return self._box.decoding.body([{"role": "user", "content": prompt}])

    def note(self, result: str) -> None:
        self._calls.append(f"-> {result}")

    def state(self) -> str:
        return ""

    def close(self) -> None:
        pass


def invented(
    themes: Sequence[str],
    endpoint: Endpoint,
    answers: str,
    *,
    most: int = 5,
    decoding: Decoding = Decoding(temperature=0.7, max_tokens=2048),
) -> tuple[tuple[Tool, ...], dict[str, int]]:
    """Tools that a model thinks of for each theme, and counts: tools_asked (themes), tools_failed,
    tools_bad (unreadable, no schema), tools_twice (a name that was there), tools_kept.
    """
    counts = Counter(tools_asked=len(themes), tools_failed=0, tools_bad=0, tools_twice=0)
    found: dict[str, Tool] = {}
    prompts = [INVENT.replace("{most}", str(most)).replace("{theme}", theme) for theme in themes]
    with Answers(endpoint, answers) as asked:
        bodies = (decoding.body([{"role": "user", "content": prompt}]) for prompt in prompts)
        for reply in asked.ask(bodies):
            counts["tools_failed"] += bool(reply.failure)
            for line in json_lines(reply.content)[:most]:
                tool = _read_tool(line)
                counts["tools_bad"] += tool is None
                counts["tools_twice"] += tool is not None and tool.name in found
                if tool is not None:
                    found.setdefault(tool.name, tool)
    return tuple(found.values()), dict(counts) | {"tools_kept": len(found)}


def representatives(tools: Sequence[Tool], k: int, *, seed: int = 0) -> tuple[Tool, ...]:
    """k tools that stand for all: of each cluster of descriptions the one nearest to its centre.

    In the order of `tools`; all of them where there are no more than k. Source: spec 7.1.5 (2),
    which does not say how the subset is found (k-means is a CHOICE).
    """
    if len(tools) <= k:
        return tuple(tools)
    texts = [f"{tool.name.replace('_', ' ')} {tool.description}" for tool in tools]
    order_N = np.random.default_rng(seed).permutation(len(texts))
    x_ND = Lexical().fit(iter([texts]))([texts[i] for i in order_N])
    centre_KD, cluster_N = kmeans(x_ND, k, 20)
    near_N = (x_ND * centre_KD[cluster_N]).sum(1)
    kept = {int(order_N[max(np.flatnonzero(cluster_N == c), key=lambda i: (near_N[i], -i))])
            for c in np.unique(cluster_N)}  # fmt: skip
    return tuple(tools[i] for i in sorted(kept))


def shown(value: Any) -> str:
    """A result as JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=True)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(repr(value), ensure_ascii=False)
    cut = len(text) - MOST_RESULT
    return text if cut <= 0 else f"{text[:MOST_RESULT]} [... {cut} more characters]"


def _read_tool(line: str) -> Tool | None:
    try:
        fields = json.loads(line)
        fields = fields.get("function", fields)
        name, about = fields["name"], fields["description"]
        if not isinstance(about, str) or not str(name).isidentifier():
            return None
        return Tool(name, about, json.dumps(fields["parameters"], sort_keys=True))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _schema(kind: str) -> dict[str, Any]:
    if kind.startswith("array of "):
        return {"type": "array", "items": {"type": kind.removeprefix("array of ")}, "maxItems": 100}
    return {"type": kind}


@lru_cache(maxsize=16)
def _tools_of(functions: tuple[Function, ...]) -> tuple[Tool, ...]:
    return tuple(function.tool() for function in functions)


@lru_cache(maxsize=1024)
def _validator(parameters: str) -> Any:
    return Draft202012Validator(json.loads(parameters))
