"""Laws of the tools of agents: what a model writes is an argument, bounded in time and size."""

import itertools
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.endpoint import Endpoint
from glm45_jax.data.tables import Tables
from glm45_jax.data.tools import (
    LIBRARY,
    MOST_RESULT,
    Function,
    Functions,
    Played,
    Tool,
    invented,
    representatives,
    shown,
)
from glm45_jax.values import from_json, to_json
from tests.data.stub_endpoint import serving

SHOP = Tables(
    "CREATE TABLE stock (item TEXT PRIMARY KEY, n INTEGER);"
    "INSERT INTO stock VALUES ('pen', 3), ('ink', 5);"
)
EMPTY = json.dumps({"type": "object", "properties": {}})
# An argument of each kind, of about the most characters that a call may have.
LARGE = {
    "string": "a " * 1900,
    "integer": 10**1200 + 1,
    "number": 1.5e300,
    "array of number": [float(10**i) for i in range(100)],
    "array of string": ["a" * 18 + "b"] * 100,
}
SMALL = {"string": "a", "integer": 7, "number": 0.5}
SMALL |= {"array of number": [1, 2.5], "array of string": ["b", "a"]}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def called(box, *calls):
    """Results of SQL or of other calls, and the state after them."""
    session = box.open()
    try:
        return [json.loads(session.call(*call)) for call in calls], session.state()
    finally:
        session.close()


@pytest.mark.parametrize("function", LIBRARY, ids=lambda f: f.path)
def test_every_function_of_the_library_answers_small_and_large_arguments_at_once(function):
    tool = function.tool()
    assert tool.description and tool.name.isidentifier()
    for sizes in (SMALL, LARGE):
        arguments = {name: sizes[kind] for name, kind in function.arguments}
        if tool.wrong(arguments):
            assert sizes is LARGE  # too many characters together
            continue
        session, began = Functions().open(), time.monotonic()
        result = session.call(tool.name, arguments)
        assert time.monotonic() - began < 0.5 and len(result) < MOST_RESULT + 50
        assert (result, "") == (session.call(tool.name, arguments), session.state())


ODD = {  # what JSON and the schema let through
    "string": ["", "\0", "'", "%zz", "http://[", "\ud800"],
    "integer": [0, -1, 10**400],
    "number": [0.0, math.inf, -math.inf, math.nan, 10**400],
    "array of number": [[], [math.inf], [math.nan, 1], [math.inf, -math.inf], [10**400, 1.5]],
    "array of string": [[], [""]],
}


@pytest.mark.parametrize("function", LIBRARY, ids=lambda f: f.path)
def test_no_argument_that_fits_the_schema_ends_a_run(function):
    names, kinds = zip(*function.arguments, strict=True)
    for values in itertools.product(*(ODD[kind] for kind in kinds)):
        arguments = dict(zip(names, values, strict=True))
        assert not function.tool().wrong(arguments)
        assert Functions().open().call(function.tool().name, arguments)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_a_function_gives_what_it_gives_in_python(data):
    import statistics

    ((result,), _) = called(Functions(), ("statistics_median", {"data": data}))
    assert result == statistics.median(data)


def test_arguments_are_held_to_the_schema():
    tool = Function("math.gcd", (("a", "integer"), ("b", "integer"))).tool()
    assert tool.wrong({"a": 4, "b": 6}) == ""
    for bad in (
        {"a": 4},
        {"a": 4, "b": "6"},
        {"a": 4, "b": 6, "c": 1},
        {"a": True, "b": 1},
        [4, 6],
    ):
        assert tool.wrong(bad)
    assert "characters" in Functions().tools()[0].wrong({"data": [1.5] * 2000})


@pytest.mark.parametrize(
    "parameters, why",
    [
        ("{", "no JSON schema"),
        ('{"type": "nothing"}', "no JSON schema"),
        ('{"type": "string"}', "give an object"),
        ('{"type": "object", "properties": {"a": {"$ref": "http://host/s"}}}', "ref"),
        ('{"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}}', "pattern"),
    ],
)
def test_a_schema_that_is_none_or_may_never_end_is_refused(parameters, why):
    with pytest.raises(ValueError, match=why):
        Tool("t", "", parameters)


def test_calls_of_a_database_see_what_those_before_them_changed_and_sessions_do_not():
    sql = "UPDATE stock SET n = n - 1 WHERE item = 'pen'"
    read = ("query", {"sql": "SELECT n FROM stock ORDER BY item"})
    results, after = called(SHOP, read, ("execute", {"sql": sql}), read)
    assert [results[0]["rows"], results[1], results[2]["rows"]] == [
        [[5], [3]],
        {"changed": 1},
        [[5], [2]],
    ]
    (first,), before = called(SHOP, read)
    assert first["rows"] == [[5], [3]] and before != after
    assert called(SHOP, ("execute", {"sql": sql}))[1] == after
    assert "CREATE TABLE stock" in called(SHOP, ("describe", {}))[0][0][0]


@pytest.mark.parametrize(
    "tool, sql",
    [
        ("query", "DELETE FROM stock"),
        ("execute", "DROP TABLE stock"),
        ("execute", "ATTACH DATABASE '/tmp/x.db' AS other"),
        ("execute", "PRAGMA max_page_count = 1000000000"),
        ("execute", "DELETE FROM stock; DELETE FROM stock"),
        ("execute", "VACUUM INTO '/tmp/x.db'"),
        ("query", "SELECT load_extension('x')"),
        ("query", "SELECT random()"),
        ("query", "SELECT current_timestamp"),
        ("query", "SELECT zeroblob(1000000000)"),
        ("query", "SELECT sqlite_version()"),
        ("query", "SELECT printf('%.*c', 1000000000, 'x')"),
        ("query", "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT sum(x) "
                  "FROM c"),
        ("query", "WITH RECURSIVE c(x) AS (SELECT zeroblob(19000) UNION ALL SELECT x FROM c) "
                  "SELECT x FROM c ORDER BY x"),
        ("execute", "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) INSERT INTO "
                    "stock SELECT x, x FROM c"),
        ("query", "SELECT 1 FROM nowhere"),
        ("query", "not SQL"),
        ("query", "SELECT '\0'"),
        ("query", ""),
    ],
)  # fmt: skip
def test_hostile_sql_changes_nothing_and_ends_soon(tool, sql):
    began = time.monotonic()
    (result, rows), state = called(
        SHOP, (tool, {"sql": sql}), ("query", {"sql": "SELECT * FROM stock"})
    )
    assert time.monotonic() - began < 2
    assert "error" in result or result == {"changed": -1}, result
    assert sorted(rows["rows"]) == [["ink", 5], ["pen", 3]] and state == called(SHOP)[1]


def test_a_transaction_does_not_outlive_its_call():
    begin, change = ("execute", {"sql": "BEGIN"}), ("execute", {"sql": "DELETE FROM stock"})
    assert called(SHOP, begin, change)[1] == called(SHOP, change)[1]


def test_tables_that_sqlite_refuses_are_refused_at_once():
    with pytest.raises(ValueError, match="SQLite refuses"):
        Tables("CREATE TABLE (")


@given(st.text(max_size=5000) | st.lists(st.integers(), max_size=3000))
def test_a_long_result_is_cut_and_says_by_how_much(value):
    whole = json.dumps(value, ensure_ascii=False)
    text = shown(value)
    if len(whole) <= MOST_RESULT:
        assert json.loads(text) == value
    else:
        assert text.endswith(f"[... {len(whole) - MOST_RESULT} more characters]")


def test_representatives_come_from_every_kind_of_tool():
    kinds = ["weather forecast of a city", "price of a share", "translate a text", "book a flight"]
    tools = [Tool(f"t{i}_{n}", f"{kind} {n}", EMPTY) for i, kind in enumerate(kinds)
             for n in range(5)]  # fmt: skip
    chosen = representatives(tools, 4)
    assert {tool.name[:2] for tool in chosen} == {"t0", "t1", "t2", "t3"}
    assert chosen == representatives(tools, 4) and set(chosen) < set(tools)
    assert representatives(tools, 20) == tuple(tools)


def test_a_model_invents_tools_and_what_is_no_tool_is_counted(tmp_path):
    good = {"name": "book_room", "description": "Books.", "parameters": json.loads(EMPTY)}
    lines = [
        "Here you are:",
        json.dumps(good),
        json.dumps({"type": "function", "function": good}),
        json.dumps(good | {"name": "no name"}),
        json.dumps(good | {"name": "x", "parameters": {"type": "string"}}),
        "{broken",
        '{"function": 3}',
    ]
    with serving(lambda body: "\n".join(lines)) as (stub, endpoint):
        tools, counts = invented(["a hotel"], endpoint, str(tmp_path / "a"), most=9)
        again = invented(["a hotel"], endpoint, str(tmp_path / "a"), most=9)
        assert len(stub.bodies) == 1 and "a hotel" in stub.bodies[0]["messages"][0]["content"]
    assert again == (tools, counts)
    assert [tool.name for tool in tools] == ["book_room"]
    assert counts == {"tools_asked": 1, "tools_failed": 0, "tools_bad": 4, "tools_twice": 1,
                      "tools_kept": 1}  # fmt: skip


def test_a_played_tool_is_told_what_it_gave_before():
    session = Played((Tool("door", "Opens.", EMPTY),)).open()
    session.call("door", {"n": 1})
    session.note('{"open": 1}')
    prompt = session.call("door", {"n": 2})["messages"][0]["content"]
    assert '{"open": 1}' in prompt and prompt.index('{"n": 1}') < prompt.index('{"n": 2}')


@pytest.mark.parametrize("box", [Functions(), SHOP, Played((Tool("t", "", EMPTY),))])
def test_boxes_are_values(box):
    assert from_json(to_json(box)) == box and hash(box)
    assert isinstance(box.version(), str) and box.tools() == box.tools()


def test_nobody_is_asked_where_no_theme_is_given(tmp_path):
    nowhere = Endpoint("http://127.0.0.1:9/v1", "m")
    assert invented([], nowhere, str(tmp_path / "a"))[0] == ()
