"""Chat templates with the rules of the family, written for these tests: the models' own files are not ours to ship."""

TOOL_NOTES = (
    "\n\nIf you decide to call any tool(s), use the following format:\n"
    '<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, '
    '{{"name": "tool_name2", "arguments": "tool_args2"}}]'
    "</TOOLCALL>\n\nResponse from tool(s) will be returned in this format:\n"
    '<TOOL_RESPONSE>[{{"response": "tool_response1"}}, {{"response": "tool_response2"}}]</TOOL_RESPONSE>\n\n'
    "Based on the results returned by the tool(s), you can call additional tools if needed, correct tool calls if any "
    "errors are found, or just respond with the answer to the user."
)

_HEAD = """
{%- macro open(role) -%}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}{%- endmacro -%}
{%- set ns = namespace(think=true, body='', rest=messages, in_tools=false) -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set ns.rest = messages[1:] -%}{%- set ns.body = messages[0]['content'] -%}
{%- endif -%}
<|begin_of_text|>{{ open('system') }}
"""

SUPER_V15 = (
    _HEAD
    + """
{%- if ns.body != '' -%}
{%- if '/no_think' in ns.body -%}
{%- set ns.think = false -%}{%- set ns.body = ns.body.replace('/no_think', '')|trim -%}
{%- elif '/think' in ns.body -%}{%- set ns.body = ns.body.replace('/think', '')|trim -%}
{%- endif -%}
{{ ns.body + '\\n\\n' }}
{%- endif -%}
{%- if tools -%}
{{ 'You can use the following tools to assist the user if required:\\n<AVAILABLE_TOOLS>[' }}
{%- for tool in tools -%}
{{ (tool.function if tool.function is defined else tool)|tojson }}{{ ', ' if not loop.last else '' }}
{%- endfor -%}
{{ ']</AVAILABLE_TOOLS>' + tool_notes }}
{%- endif -%}
<|eot_id|>
{%- for message in ns.rest -%}
{%- if message.role == 'user' -%}{{ open('user') + message.content + '<|eot_id|>' }}
{%- elif message.role == 'tool' -%}
{{ open('tool') + '<TOOL_RESPONSE>[' if not ns.in_tools else ', ' }}{{ message.content }}
{%- set ns.in_tools = true -%}
{%- if loop.last or loop.nextitem.role != 'tool' -%}
{{ ']</TOOL_RESPONSE><|eot_id|>' }}{%- set ns.in_tools = false -%}
{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{ open('assistant') }}
{%- set text = message.content -%}
{%- if '</think>' in text -%}{%- set text = text.split('</think>')[-1].lstrip() -%}{%- endif -%}
{{ text }}
{%- if message.tool_calls -%}
{{ '<TOOLCALL>[' }}
{%- for call in message.tool_calls -%}
{%- set f = call.function -%}
{{ '{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments|tojson }}{{ '}' + (', ' if not loop.last else '') }}
{%- endfor -%}
{{ ']</TOOLCALL>' }}
{%- endif -%}
<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ open('assistant') }}{{ '' if ns.think else '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
"""
)

SUPER_V1 = (
    _HEAD
    + """
{{- ns.body|trim + '<|eot_id|>' }}
{%- for message in ns.rest -%}
{{ open(message.role) + (message.content.split('</think>')[-1]|trim) + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ open('assistant') }}{%- endif -%}
"""
)

# A template without reasoning that refuses an assistant's turn at the beginning.
PLAIN = """
{%- if messages[0]['role'] == 'assistant' -%}{{ raise_exception('the first turn must be the user\\'s') }}{%- endif -%}
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' + message.content }}<|eot_id|>
{%- endfor -%}
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}
"""
