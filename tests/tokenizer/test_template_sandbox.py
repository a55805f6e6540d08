"""Templates of strangers: what they write is what jinja writes; what does too much is ended, by count and in time."""

import json
import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.base.errors import ConfigError, DataError
from groundup.tokenizer.chat import BUILT_IN_TEMPLATE, ChatEncoder, _GenerationTag
from groundup.tokenizer.template_sandbox import CountingEnvironment, TemplateDoesTooMuch, render

pytestmark = pytest.mark.costly

CHAT = [
    {"role": "system", "content": "Be kind <b>."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.\nReally.", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
    {"role": "tool", "content": "4"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

HONEST = {
    "built-in": BUILT_IN_TEMPLATE,
    "loop variables": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}"
    "{{ loop.revindex0 }}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if loop.previtem is defined }}{% else %}none"
    "{% endfor %}",
    "no messages": "{% for m in tools[5:] %}{{ m }}{% else %}none{% endfor %}",
    "tools": "{% if tools %}{{- '# Tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.arguments | tojson(indent=2) }}"
    "{% endfor %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, n=messages | length - 1) %}{% for m in messages[::-1] %}"
    "{% set index = (messages | length - 1) - loop.index0 %}{% if m.role == 'user' and not ns.found %}"
    "{% set ns.found = true %}{% set ns.n = index %}{% endif %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m, end='\n') %}<{{ m['role'] }}>{{ m.content | trim }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}x{% endcall %}",
    "strings": "{% for m in messages %}{{ m.role.upper() ~ ': ' ~ m.content.split('?')[0].strip() + '!' }}"
    "{{ '%s-%d' % (m.role, 3) }}{{ '{:>8}|{!r}'.format(m.role, 2) }}{{ m.content.replace('a', 'bb') }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | unique | join(', ') }}{{ messages | selectattr('role', 'equalto',"
    " 'user') | list | length }}{{ messages[0] | dictsort }}{{ messages[0].items() | list }}{{ 'a\nb' | indent(4) }}"
    "{{ [3, 1, 2] | sort | reverse | list }}{{ '<b>' | e }}{{ nothing | default('d') }}{{ 3.14159 | round(2) }}",
    "sums": "{{ (1 + 2) * 3 - 4 // 3 + 7 % 4 + 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ -5 | abs }}{{ 1 / 4 }}",
    "set block": "{% set x %}a{{ messages[1].content }}{% endset %}{{ x }}{{ x | length }}{% set a, b = 1, 2 %}{{ a + b }}",
    "recursion": "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "unpacked loop": "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "tests": "{{ 'role' in messages[0] }}{{ messages is sequence }}{{ messages[0] is mapping }}{{ none is none }}",
    "range": "{% for i in range(0, messages | length, 2) %}{{ messages[i].role }}{% endfor %}",
    "escapes": "{% autoescape true %}{{ messages[0].content }}{{ '<i>' | safe }}{% endautoescape %}{{ '<i>' }}",
    "filter block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_template_writes_what_jinja_writes(name):
    extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    variables = {"messages": CHAT, "tools": TOOLS, "add_generation_prompt": True}
    expected = plain.from_string(HONEST[name]).render(variables)
    assert expected
    assert render(CountingEnvironment(extensions).from_string(HONEST[name]), 200, variables) == expected


def test_a_long_chat_is_no_fault(tokenizer):
    chat = [{"role": role, "content": f"word {n} " * 20} for n in range(500) for role in ("user", "assistant")]
    template = HONEST["loop variables"] + HONEST["macro"] + HONEST["namespace"]
    began = time.process_time()
    assert len(ChatEncoder(tokenizer, template).encode_prompt(chat)) > 10_000
    assert time.process_time() - began < 5


TOO_MUCH = {
    "loop in a loop": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "five loops": "{% for a in range(99) %}" * 5 + "x" + "{% endfor %}" * 5,
    "a loop over a loop's list": "{% set ns = namespace(l=[1]) %}{% for a in range(9999) %}{% set ns.l = ns.l + ns.l %}"
    "{% endfor %}",
    "a text doubled by +": "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "a text doubled by ~": "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "a text doubled by a block": "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "a text doubled by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for a in range(99) %}{% set ns.x = f(ns.x) %}{% endfor %}",
    "a text doubled by replace": "{% set ns = namespace(x='aa') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "a text doubled by the filter replace": "{% set ns = namespace(x='aa') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "a text doubled by join": "{% set ns = namespace(x='aaaa') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "a text doubled by the filter join": "{% set ns = namespace(x='aaaa') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x | join(ns.x) %}{% endfor %}",
    "a text doubled by format": "{% set ns = namespace(x='aaaa') %}{% for a in range(99) %}"
    "{% set ns.x = '{0}{0}{0}'.format(ns.x) %}{% endfor %}",
    "a text doubled by %": "{% set ns = namespace(x='aaaa') %}{% for a in range(99) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "escaped again and again": "{% set ns = namespace(x='&') %}{% for a in range(99999) %}{% set ns.x = ns.x | forceescape %}"
    "{% endfor %}",
    "times": "{{ 'x' * 10000000000 }}",
    "times, from the left": "{{ 10000000000 * 'x' }}",
    "times of a list": "{{ [1] * 10000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power of a power": "{{ (9 ** 999) ** 999 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "% with a width": "{{ '%1000000000d' % 1 }}",
    "% with a width of a value": "{{ '%*d' % (1000000000, 1) }}",
    "format with a width": "{{ '{:>1000000000}'.format('x') }}",
    "format with a width of a value": "{{ '{:>{}}'.format('x', 1000000000) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "the filter center": "{{ 'x' | center(1000000000) }}",
    "the filter indent": "{{ 'x' | indent(1000000000, true) }}",
    "indent by a text": "{{ ('x\n' * 100000) | indent('y' * 100000) }}",
    "tojson with an indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "a list in a list, printed": "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "a dict in a dict": "{% set ns = namespace(x={}) %}{% for a in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}"
    "{% endfor %}{{ ns.x | tojson }}",
    "a tuple in a tuple, compared": "{% set ns = namespace(x=(1,), y=(1,)) %}{% for a in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}",
    "dict()": "{% set ns = namespace(x=1) %}{% for a in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
    "{{ ns.x }}",
    "namespaces in namespaces": "{% set ns = namespace(x=1) %}{% for a in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
    "a loop that calls itself": "{% for x in range(300) recursive %}{% if loop.depth < 9 %}{{ loop(range(300)) }}{% endif %}"
    "{% endfor %}",
    "a megabyte each step": "{% for x in range(99999) recursive %}" + "y" * 100_000 + "{% endfor %}",
    "sorted again and again": "{% for a in range(99999) %}{% set x = range(9999) | sort %}{% endfor %}",
    "generators": "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_does_too_much_is_ended_in_time(name, tokenizer):
    began = time.process_time()
    with pytest.raises(ConfigError, match="E-TEMPLATE: "):
        ChatEncoder(tokenizer, TOO_MUCH[name]).encode_prompt([{"role": "user", "content": "q"}])
    assert time.process_time() - began < 2.5


WALKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ''|attr('__cl' ~ 'ass__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('touch {path}').read() }}",
    "{{ joiner.__init__.__globals__['os'].system('touch {path}') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__.os.popen('touch {path}').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ loop.__class__ }}{% for a in [1] %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "{% macro f() %}{{ caller._environment }}{% endmacro %}{% call f() %}{% endcall %}",
    "{% for a in messages.__iter__.__self__ %}{{ a.__class__ }}{% endfor %}",
    "{{ (messages | map('string')).gi_frame.f_globals }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].clear() }}",
    "{% set messages[0].role = 'x' %}",
    "{{ messages.sort(key=messages.clear) }}",
    "{% include '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ request.application.__globals__ }}",
    "{{ config.items() }}",
    "{% do messages.clear() %}",
    "{{ 1.__class__ }}",
    "{{ (1).real.__class__ }}",
    "{{ none.__class__ }}",
    "{{ nothing.__class__._fail_with_undefined_error.__globals__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ ''.format.__wrapped__.__self__.__class__ }}",
    "{{ namespace(a=1)._Namespace__attrs }}",
    "{{ messages | _counted | attr('_items') }}",
    "{{ x | tojson(object_hook=1) }}",
]


@pytest.mark.parametrize("template", WALKS)
def test_no_template_reaches_what_is_inside(template, tokenizer, tmp_path):
    path = tmp_path / "marker"
    chat = [{"role": "user", "content": "q"}]
    try:
        ids = ChatEncoder(tokenizer, template.replace("{path}", str(path))).encode_prompt(chat)
    except (ConfigError, DataError) as error:
        assert error.code in ("E-TEMPLATE", "E-TEMPLATE-CHAT")
    else:
        said = tokenizer.decode(ids)
        assert not any(
            word in said for word in ("class", "object at", "built", "root:", "__main__", "site-packages")
        ), said
    assert not path.exists() and chat == [{"role": "user", "content": "q"}]


def test_it_is_the_count_that_ends_it_and_the_same_each_time():
    template = CountingEnvironment([]).from_string(
        "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set ns.n = b %}"
        "{% endfor %}{% endfor %}"
    )
    for _ in range(2):
        with pytest.raises(TemplateDoesTooMuch, match="steps"):
            render(template, 10, {})


def test_the_limit_grows_with_the_chat(tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = "word " * 500_000
    assert len(ChatEncoder(tokenizer, template).encode_prompt([{"role": "user", "content": text}])) > 500_000
