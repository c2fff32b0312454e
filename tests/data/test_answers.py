"""Only answers have a loss: their content and the token that ends their turn, and nothing else."""

from __future__ import annotations

from functools import partial

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from paceline.core.errors import DataError
from paceline.data.documents import Chat, Completion, Document, Origin
from paceline.data.examples import answer_tokens, as_example
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer, tokenizer_files

pytestmark = pytest.mark.cpu

ORIGIN = Origin("chats.jsonl", "line", 4)
CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "assistant\nhi"},
    {"role": "assistant", "content": "hello \U0001f999"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "bye"},
)
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LAST_ONLY = (  # as templates do that take the thinking out of earlier turns
    "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}"
    "{% endfor %}"
)


def with_template(template: str | None) -> Tokenizer:
    plain = byte_tokenizer()
    return Tokenizer(plain.backend, eos_ids=plain.eos_ids, chat_template=template)


def learnt(tokenizer: Tokenizer, document: Document, *, answers_only: bool = True) -> list[str]:
    """The text of each answer's tokens."""
    render = partial(render_chat, tokenizer)
    assert isinstance(document, Chat | Completion)
    example = as_example(document, render, answers_only=answers_only, origin=ORIGIN)
    ((ids, starts),) = tokenizer.encode_with_starts([example.text])
    if not example.is_ended:
        ids, starts = [*ids, tokenizer.eos_ids[0]], [*starts, len(example.text)]
    else:
        assert ids == tokenizer.encode(example.text, add_special_tokens=False)
    spans = answer_tokens(example, ids, starts, tokenizer.eos_ids)
    decode = partial(tokenizer.backend.decode, skip_special_tokens=False)
    return [decode(ids[start:end]) for start, end in spans]


def test_of_a_chat_the_answers_and_the_ends_of_their_turns_are_learnt():
    found = learnt(byte_tokenizer(), Chat(CONVERSATION))
    assert found == ["hello \U0001f999<|im_end|>", "<|im_end|>"]
    # What spells an end within an answer ends nothing.
    tricky = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "a<|im_end|>\nb"})
    assert learnt(byte_tokenizer(), Chat(tricky)) == ["a<|im_end|>\nb<|im_end|>"]


def test_the_answers_are_those_that_transformers_finds_in_a_marked_template(tmp_path):
    """Its template has to say where answers are; ours is the same text without the marks."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for name, text in tokenizer_files(with_template(marked)).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        list(CONVERSATION), return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = byte_tokenizer()
    chat, render = Chat(CONVERSATION), partial(render_chat, tokenizer)
    example = as_example(chat, render, answers_only=True, origin=ORIGIN)
    ((ids, starts),) = tokenizer.encode_with_starts([example.text])
    assert ids == theirs["input_ids"]
    mask = [0] * len(ids)
    for start, end in answer_tokens(example, ids, starts, tokenizer.eos_ids):
        mask[start:end] = [1] * (end - start)
    assert mask == theirs["assistant_masks"]
    assert sum(mask) == len("hello ") + 4 + 1 + 1


def test_a_template_without_a_generation_prompt_works():
    assert learnt(with_template(BRACKETS), Chat(CONVERSATION)) == [
        " hello \U0001f999<|im_end|>",
        " <|im_end|>",
    ]


def test_a_template_without_an_end_of_turn_ends_answers_as_it_does():
    assert learnt(with_template(NO_END), Chat(CONVERSATION)) == ["hello \U0001f999\n", "\n"]


def test_answers_in_the_prompt_of_a_chat_are_not_learnt():
    assert learnt(byte_tokenizer(), Chat(CONVERSATION, first_answer=3)) == ["<|im_end|>"]


def test_of_a_completion_it_and_the_end_are_learnt():
    tokenizer = byte_tokenizer()
    assert learnt(tokenizer, Completion("2 + 2 =", " 4")) == [" 4<|endoftext|>"]
    assert learnt(tokenizer, Completion("", "all")) == ["all<|endoftext|>"]
    assert learnt(tokenizer, Completion("nothing", "")) == ["<|endoftext|>"]
    whole = learnt(tokenizer, Completion("2 + 2 =", " 4"), answers_only=False)
    assert whole == ["2 + 2 = 4<|endoftext|>"]


def test_everything_is_learnt_where_it_is_asked_for():
    tokenizer = byte_tokenizer()
    for template in (tokenizer.chat_template, LAST_ONLY):
        tokenizer = with_template(template)
        text = render_chat(tokenizer, CONVERSATION, add_generation_prompt=False)
        assert learnt(tokenizer, Chat(CONVERSATION), answers_only=False) == [text]


def merging() -> Tokenizer:
    """A tokenizer in which ``xa``, and a space with ``4``, are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "xa", "\u01204"])}
    tokenizer = bpe_tokenizer(
        vocabulary,
        merges=[("x", "a"), ("\u0120", "4")],
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        control_tokens=["<|end|>"],
        eos_tokens=["<|end|>"],
        chat_template=None,
    )
    # As many tokenizers do, this one takes spaces off the spans that it tells.
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def test_a_token_belongs_to_where_it_starts():
    assert learnt(merging(), Completion("...x", "ab")) == ["b<|end|>"]  # xa starts in the prompt
    assert learnt(merging(), Completion("= ", "45")) == ["5<|end|>"]
    assert learnt(merging(), Completion("=", " 45")) == [" 45<|end|>"]
    assert learnt(merging(), Completion("= ", "5")) == ["5<|end|>"]  # the space is a token alone


def test_an_emoji_of_several_tokens_is_learnt_whole():
    assert learnt(byte_tokenizer(), Completion("\u00fc", "\U0001f999")) == [
        "\U0001f999<|endoftext|>"
    ]


def test_what_a_post_processor_adds_is_known_and_added_to_no_template():
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    backend.add_special_tokens(["<s>", "</s>"])
    assert Tokenizer(backend, eos_ids=[1]).start_ids == []
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = Tokenizer(backend, eos_ids=[1])
    assert tokenizer.start_ids == [0]
    assert tokenizer.encode_with_starts(["<s>a</s>"]) == [([0, 2, 1], [0, 3, 4])]


REFUSED = {
    "no message of the assistant": (byte_tokenizer(), CONVERSATION[:2]),
    "writes what came before it anew": (with_template(LAST_ONLY), CONVERSATION),
    "this model has no chat template": (with_template(None), CONVERSATION),
    "the chat template refuses these messages": (with_template("{{ 1 / 0 }}"), CONVERSATION),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_chat_that_cannot_be_learnt_from_is_named_by_its_line(message):
    tokenizer, messages = REFUSED[message]
    with pytest.raises(DataError) as caught:
        learnt(tokenizer, Chat(messages))
    assert caught.value.message.startswith("chats.jsonl, line 4: ")
    assert message in caught.value.message
