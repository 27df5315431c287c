"""A chat template is a stranger's program: it is stopped by its own clock and by size, whatever it tries."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from nemobuild.runtime import sandbox
from nemobuild.runtime.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "a b c"}]


def _again(expression: str, start: str = "'a'") -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(40) %}}{{% set n.x = {expression} %}}{{% endfor %}}"


ENDLESS = {
    "loops": "{% for a in range(60000) %}{% for b in range(60000) %}{% endfor %}{% endfor %}",
    "silent loops": "{% for a in range(60000) %}{% set x = range(60000)|list %}{% endfor %}",
    "loops over letters": "{% set x = 'a' * 50000 %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a loop that calls itself": "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a list of lists of the same": _again("[n.x, n.x]") + "{{ n.x }}",
    "a list of lists of the same, as JSON": _again("[n.x, n.x]") + "{{ n.x|tojson }}",
}
HUGE = {
    "a repeated text": "{{ 'a' * 10**9 }}",
    "a repeated list": "{% set x = [1] * 10**9 %}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a chain of products": _again("n.x * n.x", "7"),
    "doubling by +": _again("n.x + n.x"),
    "doubling by ~": _again("n.x ~ n.x"),
    "doubling by join": _again("[n.x, n.x]|join"),
    "a join": "{{ ('a' * 60000).join(range(60000)|map('string')) }}",
    "a join filter": "{{ range(60000)|join('a' * 60000) }}",
    "a replacement": "{{ ('a' * 60000).replace('a', 'b' * 60000) }}",
    "a replacing filter": "{{ ('a' * 60000)|replace('a', 'b' * 60000) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a format filter": "{{ '%1000000000d'|format(1) }}",
    "a format with a width given": "{{ '%*d' % (1000000000, 1) }}",
    "a format method": "{{ '{:>1000000000}'.format(1) }}",
    "padding": "{{ 'a'.ljust(1000000000) }}",
    "tabs": "{{ ('\\t' * 60000).expandtabs(60000) }}",
    "centering": "{{ 'a'|center(1000000000) }}",
    "an indentation": "{{ ('\\n' * 60000)|indent(60000) }}",
    "an indentation by text": "{{ ('\\n' * 60000)|indent('a' * 60000) }}",
    "indented JSON": "{{ range(60000)|list|tojson(indent=60000) }}",
    "translation": "{{ ('a' * 60000).translate({97: 'b' * 60000}) }}",
    "filler": "{{ lipsum(100000) }}",
    "output": "{% set x = 'a' * 60000 %}{% for i in range(60000) %}{{ x }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def _less_memory_than_it_tries_to_take():
    """Without the bounds these would be stopped by the kernel, not by a test."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_ended(name, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.2)
    begin = time.thread_time()
    with pytest.raises(ValueError, match=r"the chat template refused the messages: (it takes too long|maximum rec)"):
        ChatTemplate(ENDLESS[name]).render(MESSAGES)
    assert time.thread_time() - begin < 2


@pytest.mark.parametrize("name", HUGE)
def test_what_would_be_huge_is_not_made(name):
    begin = time.thread_time()
    with pytest.raises(ValueError, match=r"more than|larger than|only a number|not offered|No filter|undefined"):
        ChatTemplate(HUGE[name]).render(MESSAGES)
    assert time.thread_time() - begin < 3


def test_ordinary_programs_are_not_disturbed():
    template = ChatTemplate(
        "{% for m in messages if m.role != 'tool' %}{{ loop.index }}/{{ loop.length }} {{ m['role']|upper ~ ': ' }}"
        "{{ m.content.split(' ')|join('-') }}{{ ', '.join(['x', 'y']) }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% endfor %}{{ '%s!' % 'end' }} {{ '{:>3}'.format(7) }} {{ {'a': [1]}|tojson(indent=2)|replace('a', 'b') }}"
        "{{ 2 * 3 }}{{ 'ab' * 2 }}{{ messages|map(attribute='role')|list|length }}{{ (1, 2)|string|indent(4) }}"
    )
    two = [*MESSAGES, {"role": "assistant", "content": "d"}]
    assert template.render(two) == (
        '1/2 USER: a-b-cx, y\n2/2 ASSISTANT: dx, yend!   7 {\n  "b": [\n    1\n  ]\n}6abab2(1, 2)'
    )


def test_a_long_conversation_is_rendered_in_its_time():
    messages = [{"role": "user" if k % 2 else "assistant", "content": "word " * 300} for k in range(5000)]
    template = ChatTemplate("{% for m in messages %}{{ m.role ~ m.content.split('</think>')[-1]|trim }}{% endfor %}")
    assert len(template.render(messages)) > 7_000_000
