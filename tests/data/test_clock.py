"""A fixed clock: the date that a template prints does not change, and nothing else does."""

import datetime
import logging

import pytest
from loading import load_examples

from jaxtune.chats.clock import fix_clock, now
from jaxtune.data import ChatTemplate, encode_prompt
from jaxtune.errors import JaxtuneError

CHAT = [{"role": "user", "content": "Hi"}]
DAY = datetime.datetime(2024, 2, 3, 14, 5, 6)
# Llama 3.2's way, GNU's flags, arithmetic, a macro, white space control; a block at either end.
DATED = {
    "llama": (
        '{%- if strftime_now is defined %}\n  {%- set date_string = strftime_now("%d %b %Y") %}\n'
        "{%- else %}\n  {%- set date_string = '26 Jul 2024' %}\n{%- endif %}\n"
        "{{- 'Today: ' + date_string }}\n{{ messages[0].content }}\n"
    ),
    "flags": "{{ strftime_now('%-d.%-m.%y, 100%% %H h') }}{{ messages[0].content }}",
    "arithmetic": "\n{% set y = strftime_now('%Y')|int - 1 %}{{ y }} {{ messages[0].content }}\n\n",
    "macro": (
        "  {% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}\n  {% for m in messages %}\n"
        "{{ day('%A') }} {{ m.content }}\n  {% endfor %}\n"
    ),
}
EXPECTED = {
    "llama": "Today: 03 Feb 2024\nHi",
    "flags": "3.2.24, 100% 14 hHi",
    "arithmetic": "\n2023 Hi\n",
    "macro": "Saturday Hi\n",
}


def render(tokenizer, source):
    return tokenizer.apply_chat_template(CHAT, chat_template=source, tokenize=False)


@pytest.mark.parametrize("name", DATED)
def test_a_fixed_clock_renders_as_transformers_does_at_that_time(name, deepseek):
    source = DATED[name]
    before = now()
    theirs = render(deepseek, source)
    ours = {render(deepseek, fix_clock(source, clock)) for clock in (before, now())}
    assert theirs in ours  # a minute may end in between
    assert ChatTemplate(deepseek, source, clock=DAY).render(CHAT) == EXPECTED[name]


def test_any_format_in_a_template_is_what_strftime_makes_of_it(deepseek):
    formats = ["100% sure, %Y", "%Y%", "%:z", "%10Y", "%Ey %Od", "%c|%x|%X", "%Y年%-m月\n", "%"]
    for format_ in formats:
        source = f"{{% set f = {format_!r} %}}{{{{ strftime_now(f) }}}}"
        assert ChatTemplate(deepseek, source, clock=DAY).render(CHAT) == DAY.strftime(format_)


def test_a_template_without_a_date_stays_as_it_is(deepseek, templates):
    assert all(fix_clock(source, clock=DAY) is source for source in templates.values())


def test_a_format_that_is_put_together_is_known_or_refused(deepseek):
    joined = ChatTemplate(deepseek, "{{ strftime_now('%d' ~ '/%m') }}", clock=DAY)
    assert joined.render(CHAT) == "03/02"
    unfinished = ChatTemplate(deepseek, "{{ strftime_now('%Ey, 5' ~ ' %') }}", clock=DAY)
    assert unfinished.render(CHAT) == "24, 5 %"
    with pytest.raises(JaxtuneError, match=r"f:3: .*strftime_now: the template itself has no %d"):
        ChatTemplate(deepseek, "{{ strftime_now('%' ~ 'd') }}", clock=DAY).render(CHAT, place="f:3")


def test_a_syntax_error_is_at_the_line_of_the_file(deepseek):
    with pytest.raises(JaxtuneError, match="chat template, line 2"):
        ChatTemplate(deepseek, "{{ strftime_now('%d') }}\n{% if %}", clock=DAY)


def test_a_prompt_is_asked_on_the_day_of_the_clock(deepseek, tmp_path):
    path = tmp_path / "dated.jinja"
    path.write_text(DATED["llama"])
    ids = encode_prompt(deepseek, CHAT, str(path), clock=DAY)
    assert deepseek.decode(ids) == EXPECTED["llama"]


def test_prepared_data_serve_as_long_as_the_date_is_the_same(deepseek, tmp_path, jsonl, caplog):
    rows = jsonl({"messages": [*CHAT, {"role": "assistant", "content": "Hello"}]})
    dated = tmp_path / "dated.jinja"
    dated.write_text(
        "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    later, next_day = DAY + datetime.timedelta(hours=2), DAY + datetime.timedelta(days=1)

    def load(clock, template=dated):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            examples = load_examples(
                rows,
                tokenizer=deepseek,
                max_length=64,
                chat_template=str(template),
                clock=clock,
                cache=tmp_path / "cache",
                keep=True,
            )
        return examples.fingerprint(), "using the tokenized data" in caplog.text

    first, kept = load(DAY)
    assert not kept
    assert load(later) == (first, True)
    other, kept = load(next_day)
    assert other != first and not kept
    # Another name of the same text, as a run has that keeps it.
    assert load(later, dated.rename(tmp_path / "moved.jinja")) == (first, True)
