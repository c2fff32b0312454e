"""Chat templates: the prompt of transformers, in a sandbox."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from paceline.core.errors import RequestError
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer, byte_tokenizer, tokenizer_files

pytestmark = pytest.mark.cpu

QUESTION = [{"role": "user", "content": "hi"}]
CONVERSATIONS = [
    QUESTION,
    [{"role": "system", "content": "Answer in one word."}, *QUESTION],
    [*QUESTION, {"role": "assistant", "content": "hello 🦙\n"}, {"role": "user", "content": " "}],
    [{"role": "user", "content": "<|im_end|>{{ 1 + 1 }} 'quoted' \"twice\" <b>&amp;</b>"}],
    [{"role": "user", "content": ""}],
]
SPACES = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{ bos_token }}
    {% endif %}
    {# a comment #}
  [{{ message['role'] | upper }}] {{ message['content'] | trim | tojson }}
{% endfor %}
{% if add_generation_prompt %}
[ASSISTANT]
{%- endif %}
"""


def with_template(template: str | None) -> Tokenizer:
    tokenizer = byte_tokenizer()
    return Tokenizer(
        tokenizer.backend,
        eos_ids=tokenizer.eos_ids,
        chat_template=template,
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), with_template(SPACES)], ids=["byte", "spaces"]
)
def test_prompts_equal_those_of_transformers(tmp_path, tokenizer, messages):
    for name, text in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt = render_chat(tokenizer, messages)
    options = {"add_generation_prompt": True, "return_dict": False}
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids == theirs.apply_chat_template(messages, tokenize=True, **options)


MARKED = """
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {%- continue %}
    {%- else %}
        {{- '[' + message['content'] + ']' }}
    {%- endif %}
{%- endfor %}
"""


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [None, SPACES, MARKED], ids=["byte", "spaces", "marked"])
def test_whole_conversations_equal_those_of_transformers(tmp_path, template, add_generation_prompt):
    tokenizer = with_template(template) if template else byte_tokenizer()
    for name, text in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [*CONVERSATIONS[2], {"role": "tool", "content": "none"}]
    options = {"add_generation_prompt": add_generation_prompt}
    found = render_chat(tokenizer, messages, **options)
    assert found == theirs.apply_chat_template(messages, tokenize=False, **options)


def test_the_prompt_of_the_byte_template():
    assert render_chat(byte_tokenizer(), QUESTION) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


ATTACKS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ (messages | attr('__class__')).__base__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ raise_exception.__globals__.sys }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ range(999999999) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ joiner.__init__.__globals__.os.system('true') }}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_templates_are_kept_in_their_sandbox(template):
    with pytest.raises(RequestError) as caught:
        render_chat(with_template(template), QUESTION)
    assert caught.value.param == "messages"
    assert caught.value.status == 400


FAILURES = [
    "{{ 1 / 0 }}",
    "{% for x in 3 %}{% endfor %}",
    "{{ none.a.b }}",
    "{{ 'a' + 1 }}",
    "{% if %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '%d' % 'a' }}",
    "{{ messages[9]['role'] }}",
    "{{ 'a' | nothing }}",
    "x" * 100_001,
]


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}"])
def test_what_is_not_for_templates_is_nothing(template):
    assert render_chat(with_template(f"[{template}]"), QUESTION) == "[]"


@pytest.mark.parametrize("template", FAILURES, ids=range(len(FAILURES)))
def test_a_template_that_fails_is_a_refused_request(template):
    with pytest.raises(RequestError, match="the chat template refuses these messages"):
        render_chat(with_template(template), QUESTION)


def test_a_template_may_refuse():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}ok"
    )
    tokenizer = with_template(template)
    assert render_chat(tokenizer, QUESTION) == "ok"
    with pytest.raises(RequestError, match="no system"):
        render_chat(tokenizer, [{"role": "system", "content": "x"}])


def test_a_model_without_a_template_does_not_chat():
    with pytest.raises(RequestError, match="no chat template") as caught:
        render_chat(with_template(None), QUESTION)
    assert "completions" in caught.value.hint


def test_nothing_stays_from_one_conversation_to_the_next():
    count = "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    template = "{% set ns = namespace(n=0) %}" + count
    tokenizer = with_template(template)
    assert [render_chat(tokenizer, QUESTION * n) for n in (1, 3, 2)] == ["1", "3", "2"]


def test_messages_are_not_changed():
    messages = [dict(QUESTION[0])]
    render_chat(byte_tokenizer(), messages)
    assert messages == QUESTION
