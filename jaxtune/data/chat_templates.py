"""The built-in chat templates, as Jinja text that is stored unchanged in the folders we export.

Every text is rendered as transformers renders a tokenizer's own: block tags take their line's white space and line
break with them. `BOS` opens those templates whose models start with the tokenizer's BOS token; it is taken away for
tokenizers that never add one.
"""

from typing import NamedTuple

BOS = "{{ bos_token }}"


class BuiltIn(NamedTuple):
    """A template's text, and the strings that must be single tokens for it to make sense."""

    text: str
    markers: tuple[str, ...] = ()


# Stanford Alpaca's two prompts: the answer follows "Response:" at once, as in its train.py. A system message takes the
# place of the opening sentence. `instruction` and `input` are set on rows of the alpaca format that have an input.
_ALPACA = (
    BOS
    + """
{%- set lead = 'Below is an instruction that describes a task' %}
{%- set plain = lead + '. Write a response that appropriately completes the request.' %}
{%- set with_input = lead + ', paired with an input that provides further context.'
    + ' Write a response that appropriately completes the request.' %}
{%- set ns = namespace(opening='', turns=0) %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.opening = message['content'] %}
{%- elif message['role'] == 'user' %}
{%- if ns.turns == 0 %}{{ ns.opening or (with_input if message['input'] else plain) }}{% endif %}
{%- set ns.turns = ns.turns + 1 %}
{{- '\\n\\n### Instruction:\\n' + (message['instruction'] if message['input'] else message['content']) }}
{%- if message['input'] %}{{ '\\n\\n### Input:\\n' + message['input'] }}{% endif %}
{{- '\\n\\n### Response:' }}
{%- else %}{{ message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
)

_CHATML = (
    BOS
    + """
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

# The system message lives inside the first user turn, and every exchange opens with BOS.
_LLAMA2 = """
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- (bos_token or '') + '[INST] ' + ns.system + message['content'].strip() + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

_LLAMA3 = (
    BOS
    + """
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
)

# FastChat's v1.1: "USER: ... ASSISTANT: ...</s>", a default opening where there is no system message.
_VICUNA = (
    BOS
    + """
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{%- else %}
{{- 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions." }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- (' USER: ' if loop.index0 < 2 else 'USER: ') + message['content'] + ' ASSISTANT:' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
)

# Text as it is; what is learnt ends with EOS.
_PLAIN = (
    BOS
    + """
{%- for message in messages %}
{{- message['content'] }}{% if message['role'] in ['assistant', 'text'] %}{{ eos_token }}{% endif %}
{%- endfor %}"""
)

BUILT_INS: dict[str, BuiltIn] = {
    "alpaca": BuiltIn(_ALPACA),
    "chatml": BuiltIn(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2": BuiltIn(_LLAMA2),
    "llama3": BuiltIn(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "vicuna": BuiltIn(_VICUNA),
    "plain": BuiltIn(_PLAIN),
}
