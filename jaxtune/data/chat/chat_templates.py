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

# Gemma has no system role: its text opens the first user turn, as in Gemma 3. Answers are by "model".
_GEMMA = (
    BOS
    + """
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}
{%- else %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- ns.system + message['content'].strip() + '<end_of_turn>\\n' }}{% set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
)

# The form since Mistral 7B v0.3, where [INST] and [/INST] are tokens. Mistral puts the system text before the last
# user message; here it stands before the first, so that another turn changes nothing that came before.
_MISTRAL = (
    BOS
    + """
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + ns.system + message['content'] + '[/INST]' }}{% set ns.system = '' %}
{%- else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}
{%- endfor %}"""
)

# Zephyr's role marks are plain text and turns end with EOS.
_ZEPHYR = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

_PHI = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Qwen3 keeps reasoning only after the last question, and its last answer always has a block, empty if need be. Calls
# and results are written between tags, the results in a user turn.
_QWEN3 = """
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(question=messages | length) %}
{%- for message in messages %}
{%- if message['role'] == 'user' and not (message['content'].startswith('<tool_response>')
    and message['content'].endswith('</tool_response>')) %}{% set ns.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message['role'] == 'user' or (message['role'] == 'system' and not loop.first) %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- elif message['role'] == 'assistant' %}
{%- set said, thought = message['content'] or '', message['reasoning_content'] or '' %}
{%- if not thought and '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.question and (loop.last or thought.strip('\\n')) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
{%- else %}{{ said }}{% endif %}
{%- for call in message['tool_calls'] or [] %}
{%- set function = call['function'] or call %}
{{- '\\n' if said or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message['role'] == 'tool' %}
{%- if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

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
    "gemma": BuiltIn(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "llama2": BuiltIn(_LLAMA2),
    "llama3": BuiltIn(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": BuiltIn(_MISTRAL, ("[INST]", "[/INST]")),
    "phi": BuiltIn(_PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "plain": BuiltIn(_PLAIN),
    "qwen3": BuiltIn(_QWEN3, ("<|im_start|>", "<|im_end|>")),
    "vicuna": BuiltIn(_VICUNA),
    "zephyr": BuiltIn(_ZEPHYR),
}
