"""Trajectories of agents: tasks over tools, done by a served model, kept where they succeed.

`trajectories(box, endpoint, answers)` is a `Source`, made of parts that can be used alone:
`ToolTasks` (a model writes tasks with the calls they need, and the calls are tried), `Trajectories`
(a model works on them, the tools really run, a played user talks along, judges vote), and
`Decontaminated` on both sides. For training, `chats.AsChat` gives them the tokens of the chat
format; `data/sft.py` takes the same documents.
Source: spec 6 D20, 7.1.4, 7.1.5. Prompts, number of judges and limits are a CHOICE (UNVERIFIED).
"""

import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from glm45_jax import chat
from glm45_jax.data.decontaminate import Decontaminated, Overlap
from glm45_jax.data.endpoint import Answers, Body, Decoding, Endpoint, Reply, json_lines
from glm45_jax.data.sources import Doc, Source, counted, refuse_encoder
from glm45_jax.data.synthetic import kept_once
from glm45_jax.data.tools import Session, Tool, Toolbox, representatives

log = logging.getLogger(__name__)

AGENTS_FORMAT = 1  # raise it when the same answers give other documents
DONE = "###DONE###"

WRITE = """\
An assistant has these tools, one a line:
{tools}

{about}

Write {most} tasks that a user could bring to it. {level} Each is complete and has one right \
outcome that the tools can bring about; do not name the tools in it. Write one JSON object a line \
and nothing else, with the calls of a perfect assistant in their order:
{"task": "...", "calls": [{"name": "...", "arguments": {...}}]}"""

LEVELS = (
    ("single", "Each needs exactly one call."),
    ("multi", "Each needs two to five calls."),
)

USER = """\
You play a user who wants this from an assistant:
{task}

The conversation so far:
{said}

Write the user's next message and nothing else. Ask for one part of what you want at a time, in \
your own words, and answer what the assistant asks. Do not do its work. When all you want is done, \
or the assistant can't do it, write ###DONE### instead."""

_ABOUT = """\
A user wanted this from an assistant that has tools:
{task}

What happened, one message a line:
{said}

"""
JUDGES = (
    _ABOUT + "Is all that the user wanted done, and rightly? Give your reasons in two sentences, "
    "then end with a line that says Verdict: yes or Verdict: no.",
    _ABOUT + "Does all that the assistant says follow from what the tools gave, with nothing made "
    "up and no result passed over? Give your reasons in two sentences, then end with a line that "
    "says Verdict: yes or Verdict: no.",
)


@dataclass(frozen=True)
class ToolTasks:
    """Tasks that a model writes for the tools of a box, with the calls that do them.

    requests: alternating between the two LEVELS; most: tasks of each. subset: a box with more tools
    than that gives each request as many that stand for all, other ones each time. The calls of a
    task are run where the box is exact: those that a tool refuses drop the task.
    """

    box: Toolbox
    endpoint: Endpoint
    answers: str
    requests: int = 20
    most: int = 5
    subset: int = 8
    prompt: str = WRITE
    decoding: Decoding = Decoding(temperature=0.8, max_tokens=2048)
    name: str = "agents"

    def version(self) -> str:
        """Those of the tools and of the endpoint."""
        return f"agents={AGENTS_FORMAT} {self.box.version()} {self.endpoint.version()}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """The text is the task; meta: tools, plan (both JSON), level.

        Returns counts: write_requests, write_tasks, write_failed_*, and write_bad_* (unreadable,
        call, level, plan: a tool refused it, twice).
        """
        counts = Counter(write_requests=self.requests, write_tasks=0)
        seen: set[str] = set()
        with Answers(self.endpoint, self.answers) as answers:
            replies = answers.ask(self._body(number) for number in range(self.requests))
            for number, reply in enumerate(replies):
                if reply.failure:
                    counts[f"write_failed_{reply.failure}"] += 1
                    continue
                tools = {tool.name: tool for tool in self._tools(number)}
                lines = enumerate(json_lines(reply.content)[: self.most])
                read = (self._task(number, at, line, tools) for at, line in lines)
                for task in kept_once(read, seen, counts, "write_bad_"):
                    counts["write_tasks"] += 1
                    yield task
        return dict(counts)

    def _tools(self, number: int) -> tuple[Tool, ...]:
        return representatives(self.box.tools(), self.subset, seed=number)

    def _body(self, number: int) -> Body:
        tools = "\n".join(json.dumps(t.function()["function"]) for t in self._tools(number))
        prompt = self.prompt.replace("{about}", self.box.about()).replace("{tools}", tools)
        prompt = prompt.replace("{most}", str(self.most))
        prompt = prompt.replace("{level}", LEVELS[number % len(LEVELS)][1])
        return self.decoding.body([{"role": "user", "content": prompt}], number)

    def _task(self, number: int, at: int, line: str, tools: dict[str, Tool]) -> Doc | str:
        """A task, or why a line is none. tools: those that it was written for."""
        level = LEVELS[number % len(LEVELS)][0]
        try:
            fields = json.loads(line)
            text = fields["task"].strip()
            plan = [{"name": call["name"], "arguments": call["arguments"]}
                    for call in fields["calls"]]  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError):
            return "unreadable"
        if not all(isinstance(call["name"], str) for call in plan):
            return "unreadable"
        if not text or not plan or any(_wrong(tools, call) for call in plan):
            return "call"
        if (len(plan) == 1) != (level == "single"):
            return "level"
        if self.box.exact and '{"error"' in "".join(carried_out(self.box, plan)[0]):
            return "plan"
        meta = {"level": level, "plan": json.dumps(plan, ensure_ascii=False)}
        meta["tools"] = json.dumps([t.function() for t in tools.values()], ensure_ascii=False)
        where = f"{number}#{at}"
        return Doc(where, text, self.name, meta | {"group": f"{self.name}/{where}"})


@dataclass(frozen=True)
class Trajectories:
    """The tasks of `source` as a model does them with the tools of `box`, where it succeeds.

    user: what plays the user of tasks of level multi, which so become dialogues; "" hands every
    task over whole. judges: all must say yes. samples: attempts at each task; keep: how many good
    ones of a task stay. max_turns: of the user; max_calls: of an attempt. at_once: attempts that
    are worked on together. A malformed call ends an attempt. Where the box is exact, an attempt
    must also end as the task's plan does: in the same state, or with its last result seen.
    """

    source: Source
    box: Toolbox
    endpoint: Endpoint
    answers: str
    user: str = USER
    judges: tuple[str, ...] = JUDGES
    samples: int = 1
    keep: int = 1
    max_turns: int = 6
    max_calls: int = 16
    at_once: int = 64
    decoding: Decoding = Decoding(temperature=0.7, top_p=0.95, max_tokens=4096)
    judging: Decoding = field(default=Decoding(temperature=0.0, max_tokens=1024))

    def __post_init__(self):
        refuse_encoder(self.source, "Trajectories")
        least = min(self.max_turns, self.max_calls, self.at_once)
        if not 1 <= self.keep <= self.samples or least < 1:
            raise ValueError(
                f"keep {self.keep} of {self.samples} samples, max_turns {self.max_turns}, max_calls"
                f" {self.max_calls}, at_once {self.at_once}: use 1 to samples, and 1 or more"
            )

    @property
    def name(self) -> str:
        """The name of the tasks."""
        return self.source.name

    def version(self) -> str:
        """Those of the tasks, the tools and the endpoint."""
        inside = (self.source.version(), self.box.version(), self.endpoint.version())
        return " ".join([f"agents={AGENTS_FORMAT}", *filter(None, inside)])

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """One document a trajectory: the rendered chat, meta["messages"] and meta["tools"] as JSON.

        Returns counts: agents_tasks, _solved, _kept, _attempts, _calls, _turns (of kept ones), and
        attempts by verdict: agents_good, _failed_*, _cut (by max_tokens), _malformed (a call),
        _repeats, _too_many_calls, _no_call, _not_reached (the end of the plan), _judged_bad;
        tasks_* as the tasks counted themselves.
        """
        inner: dict[str, int] = {}
        counts = Counter(agents_tasks=0, agents_solved=0, agents_kept=0, agents_attempts=0)
        tasks = counted(self.source, inner)
        with Answers(self.endpoint, self.answers) as answers:
            while group := list(islice(tasks, max(1, self.at_once // self.samples))):
                each = [self._attempt(task, n) for task in group for n in range(self.samples)]
                runs = iter(together(each, answers))
                for task in group:
                    done = list(islice(runs, self.samples))
                    counts.update(f"agents_{run.verdict}" for run in done)
                    good = [(n, run) for n, run in enumerate(done) if run.verdict == "good"]
                    counts.update(agents_tasks=1, agents_attempts=len(done))
                    counts.update(agents_solved=int(bool(good)))
                    for number, run in good[: self.keep]:
                        counts.update(agents_kept=1, agents_calls=run.calls, agents_turns=run.turns)
                        yield self._doc(task, number, run)
        log.info("%s: %d of %d tasks done", self.name, counts["agents_solved"],
                 counts["agents_tasks"])  # fmt: skip
        return {f"tasks_{name}": n for name, n in inner.items()} | dict(counts)

    def _doc(self, task: Doc, number: int, run: "_Run") -> Doc:
        tools = json.loads(task.meta["tools"])
        text = chat.render(run.messages, tools=tools, add_generation_prompt=False)
        meta = {**task.meta, "messages": json.dumps(run.messages, ensure_ascii=False)}
        return Doc(f"{task.id}/{number}", text, task.source, meta)

    def _attempt(self, task: Doc, number: int) -> "Generator[Body, Reply, _Run]":
        """One attempt: yields requests, is sent their replies."""
        run, session = _Run(), self.box.open()
        tools = json.loads(task.meta["tools"])
        dialogue = bool(self.user) and task.meta.get("level") == "multi"
        try:
            for turn in range(self.max_turns if dialogue else 1):
                said = task.text
                if dialogue:
                    reply = yield self._user_body(task, run, number)
                    said = reply.content.strip()
                    if DONE in said and turn:
                        break
                    if reply.failure or not said or DONE in said:
                        return run.ended(f"failed_{reply.failure or 'user'}")
                run.messages.append({"role": "user", "content": said})
                run.turns += 1
                yield from self._turn(run, session, tools, number)
                if run.verdict:
                    return run
            if not run.calls:
                return run.ended("no_call")
            if self.box.exact and not self._reached(task, run, session):
                return run.ended("not_reached")
        finally:
            session.close()
        for judge in self.judges:
            reply = yield self.judging.body([{"role": "user", "content": _about(judge, task, run)}])
            if not verdict_of(reply.content):
                return run.ended("judged_bad")
        return run.ended("good")

    def _turn(
        self, run: "_Run", session: Session, tools: list[Any], number: int
    ) -> Generator[Body, Reply, None]:
        """The assistant's messages until one calls nothing; sets a verdict where it goes wrong."""
        known = {tool.name: tool for tool in self.box.tools()}
        known = {t["function"]["name"]: known[t["function"]["name"]] for t in tools}
        while True:
            body = self.decoding.body(_wire(run.messages), number)
            reply = yield {**body, "tools": tools}
            message = None if reply.failure else _message(reply, tools)
            if message is None or reply.finish == "length" or _loops(message):
                why = "repeats" if message else "malformed"
                why = "cut" if reply.finish == "length" else why
                run.ended(f"failed_{reply.failure}" if reply.failure else why)
                return
            run.messages.append(message)
            calls = [call["function"] for call in message.get("tool_calls", ())]
            if not calls:
                return
            run.calls += len(calls)
            for call in calls:
                run.seen[json.dumps(call, sort_keys=True)] += 1
            if any(_wrong(known, call) for call in calls):
                run.ended("malformed")
            elif run.calls > self.max_calls:
                run.ended("too_many_calls")
            elif max(run.seen.values()) > 2:
                run.ended("repeats")
            if run.verdict:
                return
            for call, made in zip(calls, message["tool_calls"], strict=True):
                result = session.call(call["name"], call["arguments"])
                if not isinstance(result, str):  # a model plays the tool
                    reply = yield result
                    if reply.failure:
                        run.ended(f"failed_{reply.failure}")
                        return
                    result = reply.content.strip()
                    session.note(result)
                run.results.append(result)
                run.messages.append({"role": "tool", "tool_call_id": made["id"], "content": result})

    def _user_body(self, task: Doc, run: "_Run", number: int) -> Body:
        prompt = _about(self.user, task, run, spoken=True)
        return self.decoding.body([{"role": "user", "content": prompt}], number)

    def _reached(self, task: Doc, run: "_Run", session: Session) -> bool:
        results, state = carried_out(self.box, json.loads(task.meta["plan"]))
        return session.state() == state and (bool(state) or results[-1] in run.results)


def trajectories(
    box: Toolbox,
    endpoint: Endpoint,
    answers: str,
    evaluations: tuple[Source, ...] = (),
    *,
    requests: int = 20,
    overlap: Overlap = Overlap(),
    **fields: Any,
) -> Source:
    """Tasks over the tools of a box and how a model does them, without what is in the evaluation
    sets. answers: the file of the model's answers. fields: those of `Trajectories`.
    """
    tasks: Source = ToolTasks(box, endpoint, answers, requests)
    if not evaluations:
        return Trajectories(tasks, box, endpoint, answers, **fields)
    tasks = Decontaminated(tasks, evaluations, overlap)
    done = Trajectories(tasks, box, endpoint, answers, **fields)
    return Decontaminated(done, evaluations, overlap)


def carried_out(box: Toolbox, plan: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """Results of the calls of a plan from the first state, and the state they lead to.

    Raises: ValueError for tools that a model plays.
    """
    session = box.open()
    try:
        results = [session.call(call["name"], call["arguments"]) for call in plan]
        if not all(isinstance(result, str) for result in results):
            raise ValueError(f"{type(box).__name__} is not exact; its plans can't be carried out")
        return [str(result) for result in results], session.state()
    finally:
        session.close()


def together(
    attempts: "Sequence[Generator[Body, Reply, _Run]]", answers: Answers
) -> "Iterator[_Run]":
    """What the attempts return, in their order; their requests are out at the same time."""
    done: dict[int, _Run] = {}
    waiting: dict[int, Body] = {}

    def go_on(at: int, reply: Reply | None) -> None:
        try:
            waiting[at] = next(attempts[at]) if reply is None else attempts[at].send(reply)
        except StopIteration as end:
            done[at] = end.value

    try:
        for at in range(len(attempts)):
            go_on(at, None)
        while waiting:
            asked, waiting = waiting, {}
            for at, reply in zip(asked, answers.ask(list(asked.values())), strict=True):
                go_on(at, reply)
    finally:
        for attempt in attempts:
            attempt.close()
    return iter([done[at] for at in range(len(attempts))])


def verdict_of(text: str) -> bool:
    """Whether the last verdict in a judge's answer is yes; an answer without one is a no."""
    found = re.findall(r"verdict[\s*_`:]*(yes|no)\b", text, re.IGNORECASE)
    return bool(found) and found[-1].lower() == "yes"


@dataclass
class _Run:
    """An attempt under way. results: of tools; seen: how often each call was made."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    turns: int = 0
    verdict: str = ""

    def ended(self, verdict: str) -> "_Run":
        self.verdict = verdict
        return self


def _message(reply: Reply, tools: list[Any]) -> dict[str, Any] | None:
    """The assistant's message; None where a call is malformed. Calls that the server left in the
    text are read from there.
    """
    content, reasoning, calls = reply.content, reply.reasoning, list(reply.calls)
    if not calls:
        parsed = chat.parse(content, tools=tools)
        if parsed.dropped:
            return None
        calls = [{"function": call} for call in parsed.tool_calls]
        content, reasoning = parsed.content, reasoning or parsed.reasoning
    message: dict[str, Any] = {"role": "assistant", "content": content}
    message["reasoning_content"] = reasoning.strip()
    made = []
    for at, call in enumerate(calls):
        try:
            function = call["function"]
            arguments = function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            name = function["name"]
        except (KeyError, TypeError, ValueError):
            return None
        if not isinstance(arguments, dict) or not isinstance(name, str):
            return None
        place = {"id": f"call_{at}", "type": "function"}
        made.append(place | {"function": {"name": name, "arguments": arguments}})
    return message | ({"tool_calls": made} if made else {})


def _wire(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as an OpenAI request has them: arguments as JSON text."""
    sent = []
    for message in messages:
        message = {k: v for k, v in message.items() if k != "reasoning_content" or v}
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                calls.append(call | {"function": call["function"] | {"arguments": arguments}})
            message["tool_calls"] = calls
        sent.append(message)
    return sent


def _wrong(tools: dict[str, Tool], call: dict[str, Any]) -> str:
    """What is wrong with a call; "" where nothing is."""
    name = call["name"]
    return tools[name].wrong(call["arguments"]) if name in tools else f"there is no {name!r}"


def _loops(message: dict[str, Any]) -> bool:
    """Whether a message says the same again and again (CHOICE: it packs to a tenth)."""
    data = (message["reasoning_content"] + str(message["content"])).encode()
    return len(data) > 1000 and len(zlib.compress(data)) * 10 < len(data)


def _about(prompt: str, task: Doc, run: _Run, *, spoken: bool = False) -> str:
    """A prompt with the task and what was said; spoken: only what user and assistant said."""
    lines = []
    for message in run.messages:
        said = {k: message[k] for k in ("role", "content", "tool_calls") if message.get(k)}
        if not spoken:
            lines.append(json.dumps(said, ensure_ascii=False))
        elif message["role"] != "tool" and message["content"]:
            lines.append(f"{message['role']}: {message['content']}")
    # In this order: what was said may hold a "{task}", which stays as it is.
    return prompt.replace("{task}", task.text).replace("{said}", "\n".join(lines) or "nothing yet")
