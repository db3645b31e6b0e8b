"""Chat templates render in a process with limits; the renderings are those of transformers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from loading import load_examples

from jaxtune.chats import template_process
from jaxtune.chats.template import MAX_TEMPLATE, TemplateLimitError, read_template
from jaxtune.chats.template_process import (
    LimitExceeded,
    RenderingError,
    Request,
    render,
    render_all,
)
from jaxtune.data import ChatTemplate
from jaxtune.errors import JaxtuneError, Retry

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3
TOO_LARGE = [
    "{{ ('a' * 3000000000) | length }}",
    "{{ 'a' * 10 ** 10 }}",  # folded when the template is compiled
    "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}"
    "{% endfor %}{{ ns.a }}",
    "{{ ''.join(['a' * 1000000] * 100000) | length }}",
    "{{ '%099999999999d' % 1 }}",
]


def rendered(source, turns=TURNS, parts=((2, False),), **options):
    return render(Request.of(source, turns, parts, **options))


def child():
    """Returns the id of the process that renders, which is started if it does not run."""
    assert rendered(CONTENTS) == ["HiGood day"]
    assert template_process._process is not None
    return template_process._process._process.pid


def is_running(pid):
    """Returns whether a process exists; a zombie counts."""
    return Path(f"/proc/{pid}").exists()


ROWS = [
    {"messages": TURNS},
    {"messages": [{"role": "system", "content": "é\u2028你 🎉"}, *TURNS, *TURNS]},
    {"messages": [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]},
    {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "why"}, *TURNS]},
    {
        "messages": [
            TURNS[0],
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "arguments": {"x": 1.10, "y": 1e-7, "z": [None, True, -0.0, 10**30]},
                        },
                    }
                ],
            },
            {"role": "tool", "content": "4", "name": "f"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {"messages": [{"role": "user", "content": "a\x00b\\n\"'{{ 1 }}", "extra": {"k": [1, 2.5]}}]},
]


@pytest.mark.parametrize("prompt", [False, True])
def test_renderings_are_those_of_transformers(deepseek, prompt):
    sources = [CONTENTS, "{{ messages }}{{ tools }}{{ messages | tojson }}{{ bos_token }}{{ x }}"]
    sources += map(read_template, ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "qwen3"))
    compared = 0
    for source in sources:
        for row in ROWS:
            arguments = {"x": {"b": 0.1, "a": float("inf")}}
            options = {"tools": row.get("tools"), **arguments}
            parts = [(count, prompt) for count in range(1, len(row["messages"]) + 1)]
            found = rendered(
                source,
                row["messages"],
                parts,
                tools=row.get("tools"),
                arguments={**deepseek.special_tokens_map, **arguments},
            )
            for (count, _), text in zip(parts, found, strict=True):
                options |= {"tokenize": False, "add_generation_prompt": prompt}
                try:
                    expected = deepseek.apply_chat_template(
                        row["messages"][:count], chat_template=source, **options
                    )
                except Exception as error:
                    assert isinstance(text, RenderingError)
                    assert (str(text), text.kind) == (str(error), type(error).__name__)
                else:
                    assert text == expected
                    compared += 1
    assert compared > 50


def test_errors_of_a_template_keep_their_text_and_line():
    (error,) = rendered("{{ raise_exception('no system turns') }}")
    assert isinstance(error, RenderingError) and str(error) == "no system turns"
    (error,) = rendered("a\n{% if %}")
    assert isinstance(error, RenderingError)
    assert (error.kind, error.line) == ("TemplateSyntaxError", 2)
    (error,) = rendered("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    assert isinstance(error, RenderingError) and "recursion" in str(error)


def test_parts_fail_one_by_one():
    source = "{% if messages | length == 1 %}{{ raise_exception('one') }}{% endif %}" + CONTENTS
    first, second = rendered(source, parts=[(1, True), (2, False)])
    assert isinstance(first, RenderingError) and second == "HiGood day"


@pytest.mark.parametrize("source", TOO_LARGE)
def test_a_template_that_needs_too_much_memory_is_refused(source):
    started = time.monotonic()
    with pytest.raises(LimitExceeded, match="needs more than 768 MiB of memory"):
        rendered(source)
    assert time.monotonic() - started < 10
    assert rendered(CONTENTS) == ["HiGood day"]


def test_a_template_that_does_not_end_is_refused(monkeypatch):
    template_process.end()
    monkeypatch.setattr(template_process, "SECONDS", 1.5)
    before = child()
    with pytest.raises(LimitExceeded, match=r"takes more than 1.5 seconds"):
        rendered(ENDLESS)
    assert not is_running(before)
    monkeypatch.undo()
    assert rendered(CONTENTS) == ["HiGood day"]


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(LimitExceeded, match="writes more than 67,108,864 characters"):
        rendered("{{ 'a' * 70000000 }}")


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [(ENDLESS, "takes more than 1.5 seconds"), (TOO_LARGE[0], "needs more than 768 MiB of memory")],
)
def test_the_error_names_the_template_and_the_row(chatml, tmp_path, monkeypatch, hostile, reason):
    monkeypatch.setattr(template_process, "SECONDS", 1.5)
    template = tmp_path / "late.jinja"
    template.write_text("{% if 'x' in messages[-1].content %}" + hostile + "{% endif %}" + CONTENTS)
    data = tmp_path / "rows.jsonl"
    rows = [[*TURNS]] * 30 + [[TURNS[0], {"role": "assistant", "content": "x"}]] + [[*TURNS]] * 30
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    template_process.end()
    options = {"max_length": 64, "chat_template": str(template), "bad_rows": "skip"}
    with pytest.raises(TemplateLimitError) as error:
        load_examples(data, tokenizer=chatml, progress=False, **options)
    shown = "{% if 'x' in messages[-1].content %}" + hostile[:4]
    assert str(error.value) == f'{data}:31: chat template "{shown}"… {reason}'


def described(made):
    """Returns renderings as values that compare as equal."""
    assert not isinstance(made, LimitExceeded)
    return [(str(m), m.kind, m.line) if isinstance(m, RenderingError) else m for m in made]


def varied_requests():
    """Returns requests of many templates, some rejected, that together fill pipes many times."""
    picky = "{% if messages | length == 1 %}{{ raise_exception('one') }}{% endif %}" + CONTENTS
    requests = []
    for number in range(150):
        turns = [{"role": "user", "content": f"{number} " + "a" * (number % 7 * 20_000)}, TURNS[1]]
        source = [picky, f"{number}{CONTENTS}", "a\n{% if %}", CONTENTS * 3][number % 4]
        requests.append(Request.of(source, turns, [(1, True), (2, False)]))
    return requests


def test_requests_that_are_sent_together_are_answered_like_single_ones():
    requests = varied_requests()
    together = [described(made) for made in render_all(requests)]
    assert together == [described(render(request)) for request in requests]
    assert sum(len(text) for made in together for text in made) > 10 * 2**20


def test_texts_that_are_too_long_together_are_sent_in_several_messages(monkeypatch):
    expected = [described(made) for made in render_all(varied_requests())]
    template_process.end()
    monkeypatch.setattr(template_process, "CHARACTERS", 400_000)
    assert [described(made) for made in render_all(varied_requests())] == expected
    template_process.end()


def test_rows_share_messages_to_the_process(chatml, jsonl, monkeypatch):
    """A message for each row would slow down tokenizing by up to a third."""
    called = {"name": "f", "arguments": json.dumps({"x": 1})}
    calls = [{"type": "function", "function": called}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    rows = [{"messages": TURNS}] * 64 + [{"messages": turns, "tools": tools}] * 64
    messages = []
    ask = template_process._ask
    monkeypatch.setattr(
        template_process, "_ask", lambda requests: messages.append(len(requests)) or ask(requests)
    )
    examples = load_examples(
        jsonl(*rows), tokenizer=chatml, progress=False, max_length=2048, chat_template="qwen3"
    )
    assert len(examples.lengths) == 128
    assert max(messages) == 128 and len(messages) < 10


def test_a_template_that_never_ends_is_refused_before_any_row(chatml, monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 1.5)
    template_process.end()
    with pytest.raises(TemplateLimitError, match=r"^chat template .* takes more than 1.5 seconds"):
        ChatTemplate(chatml, ENDLESS)


def test_a_template_that_is_too_long_is_refused(chatml):
    with pytest.raises(TemplateLimitError, match=r"characters, more than 1,048,576"):
        ChatTemplate(chatml, "a" * (MAX_TEMPLATE + 1))


def test_a_process_that_was_killed_is_replaced():
    before = child()
    os.kill(before, signal.SIGKILL)
    while Path(f"/proc/{before}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert child() != before
    assert not is_running(before)


def test_a_slow_machine_is_not_the_fault_of_a_template(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    stopped = child()
    os.kill(stopped, signal.SIGSTOP)
    threading.Timer(0.7, os.kill, (stopped, signal.SIGCONT)).start()
    assert render(Request.of(CONTENTS, TURNS, [(1, False)])) == ["Hi"]
    assert child() == stopped
    os.kill(stopped, signal.SIGSTOP)
    threading.Timer(0.1, os.kill, (stopped, signal.SIGKILL)).start()  # as the kernel does
    with pytest.raises(Retry, match="killed"):
        render(Request.of(CONTENTS, TURNS, [(1, False)]))


def test_a_process_that_cannot_be_used_is_not_the_fault_of_a_template(monkeypatch, tmp_path):
    program = tmp_path / "worker.py"
    monkeypatch.setattr(template_process.template_worker, "__file__", str(program))
    template_process.end()
    program.write_text("")
    with pytest.raises(Retry, match="does not start"):
        render(Request.of(CONTENTS, TURNS, [(1, False)]))
    source = Path(template_process.encode.__code__.co_filename).read_text()
    program.write_text(source.replace("import transformers  #", "import transformed  #"))
    with pytest.raises(JaxtuneError, match=r"cannot be used: ModuleNotFoundError.*transformed"):
        render(Request.of(CONTENTS, TURNS, [(1, False)]))


def test_signals_of_a_launcher_do_not_reach_the_process():
    before = child()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(before, number)
    assert child() == before
    assert os.getsid(before) != os.getsid(0)


def test_the_process_has_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template_process.end()
    environment = Path(f"/proc/{child()}/environ").read_bytes()
    assert b"hf_secret" not in environment


def test_many_templates_and_threads_share_the_process():
    before = child()

    def work(thread):
        for number in range(100):
            assert rendered(f"{thread}.{number}") == [f"{thread}.{number}"]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert child() == before


def test_values_that_json_lacks_look_as_in_transformers(deepseek):
    import datetime

    import numpy as np

    source = "{% for m in messages %}{{ m }}{% endfor %}"
    turns = [{"role": "user", "content": "a", "when": datetime.date(2026, 1, 1), "n": np.int64(3)}]
    expected = deepseek.apply_chat_template(turns, chat_template=source, tokenize=False)
    assert rendered(source, turns, [(1, False)]) == [expected]
    assert "<date>" in expected


PARENT = """
import sys, os
from jaxtune.chats import template_process
from jaxtune.chats.template_process import Request, render
render(Request.of("a", [{"role": "user", "content": "a"}], [(1, False)]))
print(template_process._process._process.pid, flush=True)
if sys.argv[1] == "fork":
    if os.fork() == 0:
        assert render(Request.of("b", [{"role": "user", "content": "a"}], [(1, False)])) == ["b"]
        template_process.end()
        os._exit(0)
    assert os.wait()[1] == 0
    assert render(Request.of("c", [{"role": "user", "content": "a"}], [(1, False)])) == ["c"]
elif sys.argv[1] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["exit", "kill", "fork"])
def test_the_process_ends_with_its_parent(how):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "wait" if how == "kill" else how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stderr is not None
    renderer = int(parent.stdout.readline())
    if how == "kill":
        parent.kill()
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == (-signal.SIGKILL if how == "kill" else 0), errors
    assert errors == ""
    deadline = time.monotonic() + 30
    while is_running(renderer):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_tokenizer_with_several_templates_and_no_default_is_a_rejected_row(chatml):
    chatml.chat_template, before = {"a": CONTENTS, "b": CONTENTS}, chatml.chat_template
    try:
        with pytest.raises(JaxtuneError, match="multiple chat templates with no default"):
            ChatTemplate(chatml).encode(TURNS)
    finally:
        chatml.chat_template = before
