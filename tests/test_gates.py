"""The gates of ``rebuild``: prompts through a real Triton, speed against a version that is really slower, reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemobuild.config import EngineConfig, GatesConfig, reasoning_policies, reasoning_policy
from nemobuild.errors import ChildFailed, RemoteError, UsageError
from nemobuild.gates import conformance, prompts, served
from nemobuild.gates.prompts import Prompt, ToolCall, ask_all, fitting, judge, load_prompts
from nemobuild.gates.report import Report, Stage, markdown, write_report
from nemobuild.gates.results import Check, Gate, at_least, at_most
from tests.gateway_road import ANSWER, CALLS, OFF_ANSWER, REASONING, write_road

pytestmark = pytest.mark.xdist_group("triton")

POLICY = reasoning_policy("nemotron-super-v1.5")
LANGUAGES = {"en", "de", "fr", "it", "pt", "hi", "es", "th"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
ASKED = [
    Prompt(name="thought", language="de", ask="Hi", reasoning="on", tools=TOOLS, any_of=["GRÜSSE", "nothing"]),
    Prompt(name="at-once", language="th", ask="Hi", reasoning="off", any_of=["ตอบทันที"]),
    Prompt(name="other-words", language="en", ask="Hi", reasoning="off", any_of=["Paris"]),
    Prompt(name="other-call", language="en", ask="Hi", reasoning="on", tools=TOOLS, call=ToolCall(name="now")),
]
LEAK = Prompt(name="leak", language="en", ask="Hi", reasoning="on")  # a call that nobody asked for stays in the text


def profile(**gates) -> EngineConfig:
    """Of the scripted model. Nothing in it depends on how busy the machine is, unless a test says so."""
    data = {
        "description": "Scripted.",
        "runtime": "cpu",
        "model": {"source": "tiny"},
        "limits": {"max_batch_size": 4, "max_context_tokens": 2000, "default_max_tokens": 400},
        "reasoning": {"policy": "nemotron-super-v1.5", "default": "on"},
        "gates": {"rounds": 2, "concurrency": 2, "output_tokens": 6, **gates},
    }
    return EngineConfig.model_validate(data)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return write_road(tmp_path_factory.mktemp("road"), context_tokens=2000)


@pytest.fixture(scope="module")
def found(repository, tmp_path_factory) -> dict[str, served.Served]:
    """The scripted model beside a copy of it that takes its time, both asked and measured."""
    folder = tmp_path_factory.mktemp("slow")
    slow = shutil.copytree(repository, folder / "slow")
    engine = slow / "tensorrt_llm/1/lib/engine/cpu/runner.py"
    first = "        hidden = forward.embed("
    assert engine.read_text().count(first) == 1
    engine.write_text(engine.read_text().replace(first, f"        __import__('time').sleep(0.03)\n{first}"))
    file = folder / "prompts.yaml"
    file.write_text(json.dumps([prompt.model_dump(exclude_defaults=True) for prompt in (*ASKED, LEAK)]))
    notes: list[str] = []
    both = served.put_to_work(
        {"candidate": slow, "before": repository},
        profile(prompts=str(file)),
        folder / "logs",
        conforming=True,
        ready_timeout_s=120,
        on_note=notes.append,
    )
    assert "measuring the speed of candidate and before" in notes
    return both


def by_name(answers):
    return {answer.prompt: answer for answer in answers}


def test_answers_are_judged_by_what_the_model_really_said(found):
    answers = by_name(found["before"].answers)
    thought, at_once = answers["thought"], answers["at-once"]
    assert (thought.text, thought.reasoning, thought.right) == (ANSWER, REASONING, True)
    assert (at_once.text, at_once.reasoning, at_once.right) == (OFF_ANSWER, "", True)
    assert answers["other-words"].wrong == "it holds none of Paris"
    assert answers["other-call"].wrong == "it calls get_weather, not now"
    assert [name for name, answer in answers.items() if answer.unsound] == ["leak"]
    assert answers["leak"].unsound == "a tag of the model is in the text"


def test_the_share_of_right_answers_and_the_lost_ones_decide(found):
    answers = found["before"].answers[: len(ASKED)]
    assert prompts.gate(answers, None, profile(min_right=0.5).gates).passed
    assert not prompts.gate(answers, None, profile(min_right=0.51).gates).passed
    worse = [prompts.replace(answer, wrong="x") for answer in answers]
    assert [c.passed for c in judge(worse, answers, profile(min_right=0.0, max_lost=2).gates)] == [True, True, True]
    assert [c.passed for c in judge(worse, answers, profile(min_right=0.0, max_lost=1).gates)] == [True, True, False]
    assert [c.passed for c in judge(found["before"].answers, None, profile(min_right=0.0).gates)] == [False, True]


def test_a_version_that_is_slower_fails_by_the_margin(found):
    """Thirty milliseconds more for each step; a busy machine is as busy for both."""
    slow, fast = found["candidate"].cells, found["before"].cells
    assert len(slow) == len(fast) == 2  # rounds
    strict, loose = profile(max_slowdown=0.1).gates, profile(max_slowdown=1.0, max_wait_increase=1e9).gates
    gate = served.speed_gate(slow, fast, strict)
    assert (
        next(c.what for c in gate.checks if c.passed is False) == "tokens per second over those of the version before"
    )
    assert served.speed_gate(slow, fast, loose).passed
    assert served.speed_gate(slow, None, strict).passed  # nothing to compare with
    assert served.speed_gate(fast, slow, strict).passed
    failed = [prompts.replace(fast[0], errors={"refused": 1}), fast[1]]
    assert not served.speed_gate(failed, None, loose).passed


def test_one_contract_whatever_the_speed(found):
    this, that = found["candidate"].facts, found["before"].facts
    gate = conformance.gate(this, that)
    assert gate.passed and len(gate.checks) == len(conformance.CASES)
    assert this["streamed"]["finish_reason"] == "length" and this["streamed"]["completion_tokens"] == 3
    assert this["log-probabilities"]["output_log_probs length"] == 3
    refused = {name: fact["refused"] for name, fact in this.items() if name.startswith("refused")}
    assert "temperature" in refused["refused: temperature"] and "top_p" in refused["refused: whole, bad top_p"]
    other = that | {"streamed": that["streamed"] | {"prompt_tokens": 1}, "sampled": {"refused": "no"}}
    wrong = [check.what for check in conformance.gate(this, other).checks if not check.passed]
    assert wrong == ["streamed", "sampled"]


def test_a_candidate_that_does_not_start_is_an_error_and_one_before_is_not(repository, tmp_path):
    broken = shutil.copytree(repository, tmp_path / "broken")
    (broken / "tensorrt_llm/1/model.py").write_text("raise RuntimeError('not today')\n")
    file = tmp_path / "prompts.yaml"
    file.write_text(json.dumps([ASKED[1].model_dump(exclude_defaults=True)]))
    config, logs = profile(prompts=str(file), rounds=1), tmp_path / "logs"
    pair = {"candidate": repository, "before": broken}
    assert list(served.put_to_work(pair, config, logs, may_fail=("before",), ready_timeout_s=120)) == ["candidate"]
    with pytest.raises(ChildFailed, match="not today"):
        served.put_to_work({"candidate": broken}, config, logs, may_fail=("before",), ready_timeout_s=120)


def test_without_a_server_nothing_is_judged():
    with pytest.raises(RemoteError):
        ask_all("127.0.0.1:9", ASKED, POLICY, limit_tokens=8, timeout_s=60)


# What is asked.


def test_the_prompts_that_ship_cover_both_modes_tools_and_the_eight_languages():
    asked = load_prompts()
    assert {prompt.language for prompt in asked} == LANGUAGES
    for mode in ("on", "off"):
        assert any(prompt.call for prompt in asked if prompt.reasoning == mode)
        assert any(prompt.any_of for prompt in asked if prompt.reasoning == mode)
    assert all(prompt.any_of or prompt.call for prompt in asked)
    # No prompt can be answered by repeating it.
    assert not [p.name for p in asked for word in p.any_of if word.casefold() in p.ask.casefold()]


def test_a_model_is_asked_what_it_can_be_asked():
    asked = load_prompts()
    assert fitting(asked, POLICY) == asked
    assert {p.reasoning for p in fitting(asked, reasoning_policies()["nemotron-v1"])} == {"on", "off"}
    assert not any(p.tools for p in fitting(asked, reasoning_policies()["nemotron-v1"]))
    plain = fitting(asked, reasoning_policies()["none"])
    assert {p.language for p in plain} == LANGUAGES and {p.reasoning for p in plain} == {None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds no prompt"),
        ("- {name: a, language: en, ask: x}\n- {name: a, language: en, ask: x}", "'a' twice"),
        ("- {name: a, language: en, ask: x, anyof: [y]}", "0.anyof"),
        ("- {name: a, language: en, ask: x, reasoning: maybe}", "0.reasoning"),
        ("- {language: en, ask: x}", "0.name"),
    ],
)
def test_what_is_wrong_in_a_list_of_prompts_is_named(tmp_path, text, words):
    file = tmp_path / "prompts.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_prompts(file)
    assert caught.value.code == "bad-prompts"


def said(**changes):
    good = {"text_output": "fine", "reasoning_output": "", "tool_calls": [], "finish_reason": "stop"}
    return good | {"prompt_tokens": 3, "completion_tokens": 2} | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"finish_reason": "cancelled"}, "reason"),
        ({"text_output": ""}, "empty"),
        ({"completion_tokens": 0}, "counted"),
        ({"text_output": "half �"}, "broken"),
        ({"text_output": "half �", "finish_reason": "length"}, ""),
        ({"text_output": "ha�lf", "finish_reason": "length"}, "broken"),
        ({"text_output": "<think> so"}, "tag"),
        ({"reasoning_output": "hm"}, "off"),
        ({"tool_calls": [{"name": "now"}]}, "disagree"),
        ({"finish_reason": "tool_calls"}, "disagree"),
    ],
)
def test_what_breaks_the_contract_is_seen(changes, problem):
    found = prompts._unsound(ASKED[1], POLICY, said(**changes))
    assert (problem in found) if problem else found == ""


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ([], "does not call"),
        ([{"name": "other", "arguments": "{}"}], "calls other"),
        ([{"name": "get_weather", "arguments": "{"}], "not JSON"),
        ([{"name": "get_weather", "arguments": '{"city": "Rome"}'}], "city 'Rome'"),
        ([{"name": "get_weather", "arguments": "[]"}], "city None"),
        (json.loads(CALLS), ""),
    ],
)
def test_calls_are_compared_by_name_and_arguments(calls, problem):
    found = prompts._wrong_call(calls, ToolCall(name="get_weather", arguments={"city": "zürich"}))
    assert (problem in found) if problem else found == ""


# What is told.


def test_a_number_that_is_none_is_within_no_bound():
    assert not at_most("x", float("nan"), 1.0).passed and not at_least("x", float("nan"), 0.0).passed
    assert at_most("x", 1.0, 1.0).passed and at_least("x", 1.0, 1.0).passed
    assert Gate("g", (Check("told", "1", "", None),)).passed and not Gate("g", (Check("x", "1", "", False),)).passed


def test_a_report_for_people_and_for_machines(found, tmp_path):
    this, that = found["before"], found["candidate"]
    hostile = prompts.replace(this.answers[0], text="| <b>x</b> ![p](javascript:1) `a`\nb", wrong="no")
    gates = (
        prompts.gate([hostile, *this.answers[1:]], that.answers, GatesConfig()),
        served.speed_gate(this.cells, that.cells, GatesConfig()),
        Gate("quality", (at_most("perplexity", float("nan"), 0.1),), details={"perplexity": float("nan")}),
        Gate("verify", skipped="there is nothing"),
    )
    report = Report(
        title="Rebuild of tiny",
        verdict="Not published.",
        profile="tiny",
        revisions=("a" * 40, "b" * 40),
        changed=["repository: reasoning.default off -> on"],
        stages=[Stage("repository", "remake", ("why",), 1.5, 1 << 20, None)],
        gates=gates,
        made_at="2000-01-01T00:00:00+00:00",
    )
    folder = write_report(report, tmp_path / "report")
    assert {file.name for file in folder.iterdir()} == {"report.md", "report.json", "times.svg", "speed.svg"}
    strict = json.loads((folder / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert [gate["passed"] for gate in strict["gates"]] == [False, True, False, True]
    assert strict["gates"][0]["details"]["answers"][1]["text"] == OFF_ANSWER
    text = (folder / "report.md").read_text()
    assert "### speed: passed" in text and "### verify: not run" in text and "![speed](speed.svg)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| thought |"))
    assert row.replace("\\|", "").count("|") == 6 and "<b>" not in row and "![p](" not in row
    assert (folder / "speed.svg").read_text().count("<rect") == 1 + 2 + 4  # ground, legend, two rounds of two
    assert write_report(report, folder) == folder  # another takes its place
    assert markdown(report)
