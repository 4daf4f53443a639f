"""Answer spans: every assistant turn with its end, and nothing of the questions, in the templates that families publish.

The oracle is the template itself, told where the answers are: brackets around their contents.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.data.answers import ChatFormat
from atoll.data.formats import Message
from atoll.models.tiny import byte_tokenizer

EOS = "<|im_end|>"  # the byte tokenizer's

# The published templates, without what declares tools and what refuses wrong roles.
# Each with the end of its turns and its special tokens.
FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    "mistral-7b-v0.1": (  # no system text
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        EOS,
        ["[INST]", "[/INST]"],
    ),
    "mistral-7b-v0.3": (  # the system text stands in the last question, if that is the last message
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.last and system_message is defined %}"
        "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
        "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
        "{%- for call in message.tool_calls %}{{- call.function|tojson }}{%- endfor %}{{- ']' + eos_token }}"
        "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}"
        "{%- elif message['role'] == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + message.content|string + '}"
        "[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}",
        EOS,
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    ),
    "mistral-nemo": (  # the same, without blanks
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.last and system_message is defined %}"
        "{{- '[INST]' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}"
        "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}",
        EOS,
        ["[INST]", "[/INST]"],
    ),
    "mistral-small": (  # a system turn of its own
        "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{{- '[INST]' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'system' %}"
        "{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{%- elif message['role'] == 'assistant' %}"
        "{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}",
        EOS,
        ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        " " + EOS,
        [],
    ),
    "llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>'"
        " + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "llama-3.1": (  # always a system turn, with dates; one call instead of a content
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
        "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}"
        "{%- set system_message = '' %}{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}{{- system_message }}"
        "{{- '<|eot_id|>' }}{%- for message in messages %}"
        "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
        " + '<|eot_id|>' }}{%- elif 'tool_calls' in message %}{%- set tool_call = message.tool_calls[0].function %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{{- '{\"name\": \"' + tool_call.name + '\", \"parameters\": ' }}{{- tool_call.arguments | tojson }}{{- '}' }}"
        "{{- '<|eot_id|>' }}{%- elif message.role == 'tool' %}"
        "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- message.content }}{{- '<|eot_id|>' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{%- endif %}",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gemma-2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n'"
        " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<end_of_turn>",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "gemma-3": (  # the system text stands in the first question
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
        "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
        "{%- for message in loop_messages -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
        "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
        "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
        "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}",
        "<end_of_turn>",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "qwen-2.5": (  # a system turn of its own making; calls after a content
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
        " or (message.role == 'assistant' and not message.tool_calls) %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}{%- if message.content %}"
        "{{- '\n' + message.content }}{%- endif %}{%- for tool_call in message.tool_calls %}"
        '{%- set tool_call = tool_call.function %}{{- \'\n<tool_call>\n{"name": "\' }}{{- tool_call.name }}'
        "{{- '\", \"arguments\": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}"
        "{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        EOS,
        [],
    ),
    "qwen-3": (  # thinking stays in the answers after the last question only
        "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{%- endif %}{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.multi_step_tool and message.role == 'user' %}{%- set ns.multi_step_tool = false %}"
        "{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{%- for message in messages %}"
        "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set content = message.content %}{%- set reasoning_content = '' %}"
        "{%- if '</think>' in message.content %}"
        "{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}{%- set reasoning_content ="
        " message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index %}{%- if loop.last or (not loop.last and reasoning_content) %}"
        "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n'"
        " + content.lstrip('\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{%- if message.tool_calls %}"
        "{%- for tool_call in message.tool_calls %}{%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}"
        '{%- endif %}{{- \'<tool_call>\n{"name": "\' }}{{- tool_call.function.name }}{{- \'", "arguments": \' }}'
        "{{- tool_call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}",
        EOS,
        [],
    ),
    "phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content']"
        " + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        EOS,
        [],
    ),
    "deepseek-r1": (  # thinking goes, and the prompt opens it
        "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{{'<User>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}"
        "{% set content = message['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<Assistant>' + content + eos_token}}{%- endif %}"
        "{%- endfor -%}{% if add_generation_prompt %}{{'<Assistant><think>\n'}}{% endif %}",
        EOS,
        ["<User>", "<Assistant>", "<think>", "</think>"],
    ),
    "command-r": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% if system_message != false %}"
        "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% for message in loop_messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
        [f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT")],
    ),
    "granite-3": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set system_message = 'You are Granite.' %}"
        "{%- set loop_messages = messages %}{%- endif %}{{- '<|start_of_role|>system<|end_of_role|>' + system_message"
        " + '<|end_of_text|>\n' }}{%- for message in loop_messages %}{{- '<|start_of_role|>' + message['role']"
        " + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
        "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}",
        "<|end_of_text|>",
        ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    ),
}
NO_SYSTEM = {"mistral-7b-v0.1", "gemma-2"}


def chat_format(family: str) -> ChatFormat:
    template, _, special = FAMILIES[family]
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def say(role: str, content: str, **others: Any) -> Message:
    return {"role": role, "content": content, **others}


def conversation(contents: list[str], system: str = "") -> list[Message]:
    head = [say("system", system)] if system else []
    return [*head, *(say(("user", "assistant")[n % 2], content) for n, content in enumerate(contents))]


def bracketed(form: ChatFormat, messages: list[Message], end: str) -> str:
    """The text with brackets around each answer and its end: the template writes them around the contents."""
    shown = [m | {"content": f"⟦{m['content']}⟧"} if m["role"] == "assistant" else m for m in messages]
    return form.render(shown).replace("⟧" + end, end + "⟧")


def with_spans(text: str, spans: list[tuple[int, int]]) -> str:
    for start, stop in reversed(spans):
        text = f"{text[:start]}⟦{text[start:stop]}⟧{text[stop:]}"
    return text


TURNS = st.lists(st.text(st.sampled_from("ab \n<|_>[]:é漢"), min_size=1).map(lambda t: t.strip() or "x"), min_size=2)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(contents=TURNS, system=st.sampled_from(["", "Be brief.", "a"]))
def test_spans_are_the_answers_and_their_ends(family: str, contents: list[str], system: str) -> None:
    form = chat_format(family)
    messages = conversation(contents, "" if family in NO_SYSTEM else system)
    text, spans = form.answers(messages)
    assert with_spans(text, spans) == bracketed(form, messages, FAMILIES[family][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_the_same_in_messages_with_further_keys(family: str) -> None:
    """Further keys rule the frame out: each answer is found by itself."""
    form = chat_format(family)
    head = "" if family in NO_SYSTEM else "Be brief."
    messages = [m | {"name": "ann"} for m in conversation(["q1 a1", "a1", "a2?", "a2", "a3?", "a3"], head)]
    text, spans = form.answers(messages)
    assert with_spans(text, spans) == bracketed(form, messages, FAMILIES[family][1])


def test_mistral_keeps_loss_off_the_question_when_there_is_a_system_text() -> None:
    text, spans = chat_format("mistral-7b-v0.3").answers(conversation(["SECRET?", "yes"], "Be brief."))
    assert with_spans(text, spans) == f"<|im_start|>[INST] SECRET?[/INST] ⟦yes{EOS}⟧"


CALL = [{"type": "function", "id": "123456789", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
CALLED = {
    "mistral-7b-v0.3": '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "UTC"}}]' + EOS,
    "llama-3.1": '{"name": "clock", "parameters": {"zone": "UTC"}}<|eot_id|>',
    "qwen-2.5": '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>' + EOS,
    "qwen-3": '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>' + EOS,
}


@pytest.mark.parametrize("family", CALLED)
def test_a_call_and_the_answer_that_follows_it_are_found(family: str) -> None:
    end = FAMILIES[family][1]
    messages = [
        say("user", "time?"),
        say("assistant", "", tool_calls=CALL),
        say("tool", "noon"),
        say("assistant", "It is noon."),
        *conversation(["Thanks, noon", "Bye."]),
    ]
    text, spans = chat_format(family).answers(messages)
    found = [text[start:stop] for start, stop in spans]
    assert found == [CALLED[family], "It is noon." + end, "Bye." + end]


def test_thinking_is_labeled_where_the_template_keeps_it() -> None:
    """After a later question Qwen3 drops the thinking of a call, which the prompt for its answer still holds."""
    messages = [
        say("user", "time?"),
        say("assistant", "<think>\nlook\n</think>\n\nOne moment.", tool_calls=CALL),
        say("tool", "noon"),
        say("assistant", "<think>ok</think>It is noon."),
        say("user", "Sure?"),
        say("assistant", "<think>hm</think>Yes."),
    ]
    text, spans = chat_format("qwen-3").answers(messages)
    called, answered, last = (text[start:stop] for start, stop in spans)
    assert called == "One moment.\n" + CALLED["qwen-3"]
    assert answered == "It is noon." + EOS
    assert last == "<think>\nhm\n</think>\n\nYes." + EOS


def test_an_answer_that_cannot_be_told_from_the_rest_gives_no_spans() -> None:
    """Mistral shows a call instead of its content, and the prompt for it has the system text where the text has none."""
    messages = [*conversation(["time?"], "Be brief."), say("assistant", "", tool_calls=CALL), say("tool", "noon")]
    text, spans = chat_format("mistral-7b-v0.3").answers([*messages, say("assistant", "It is noon.")])
    assert CALLED["mistral-7b-v0.3"] in text
    assert spans == []
