"""The chat template of a tiny checkpoint: what MiniMax-M3's does, written here.

``thinking_mode`` leaves the prompt inside a thought (enabled), behind one (disabled), or where the model chooses
(adaptive, or not given). Tools are offered as JSON in a system message, and called as tags in M3's namespace, which
nest as the arguments do.
"""

CHAT_TEMPLATE = """\
{%- set names = {"system": "system", "user": "user", "assistant": "ai", "tool": "tool"} -%}
{%- set namespace_tag = "]<]minimax[>[<" -%}
{%- macro argument(value) -%}
    {%- if value is mapping -%}
        {%- for key, item in value.items() -%}
            {{- namespace_tag ~ key ~ ">" ~ argument(item) ~ namespace_tag ~ "/" ~ key ~ ">" -}}
        {%- endfor -%}
    {%- elif value is string -%}
        {{- value -}}
    {%- elif value is iterable -%}
        {%- for item in value -%}
            {{- namespace_tag ~ "item>" ~ argument(item) ~ namespace_tag ~ "/item>" -}}
        {%- endfor -%}
    {%- else -%}
        {{- value | tojson -}}
    {%- endif -%}
{%- endmacro -%}
{%- if thinking_mode and thinking_mode not in ["enabled", "disabled", "adaptive"] -%}
    {{- raise_exception("thinking_mode is enabled, disabled or adaptive, not " ~ thinking_mode) -}}
{%- endif -%}
{{- bos_token -}}
{%- if tools -%}
    {{- "]~b]system\\nTools:\\n" -}}
    {%- for tool in tools -%}
        {{- tool | tojson ~ "\\n" -}}
    {%- endfor -%}
    {{- eos_token ~ "\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] not in names -%}
        {{- raise_exception("the role of a message is system, user, assistant or tool, not " ~ message["role"]) -}}
    {%- endif -%}
    {{- "]~b]" ~ names[message["role"]] ~ "\\n" -}}
    {%- if message["reasoning_content"] -%}
        {{- "<mm:think>" ~ message["reasoning_content"] ~ "</mm:think>" -}}
    {%- endif -%}
    {%- if message["content"] is string -%}
        {{- message["content"] -}}
    {%- elif message["content"] -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "image" or part["type"] == "image_url" -%}
                {{- "]<]image[>[" -}}
            {%- elif part["type"] == "video" or part["type"] == "video_url" -%}
                {{- "]<]video[>[" -}}
            {%- else -%}
                {{- part["text"] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message["tool_calls"] -%}
        {{- namespace_tag ~ "tool_call>\\n" -}}
        {%- for call in message["tool_calls"] -%}
            {%- set called = call["function"] or call -%}
            {{- namespace_tag ~ 'invoke name="' ~ called["name"] ~ '">' ~ argument(called["arguments"]) -}}
            {{- namespace_tag ~ "/invoke>\\n" -}}
        {%- endfor -%}
        {{- namespace_tag ~ "/tool_call>" -}}
    {%- endif -%}
    {{- eos_token ~ "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "]~b]ai\\n" -}}
    {%- if thinking_mode == "enabled" -%}
        {{- "<mm:think>" -}}
    {%- elif thinking_mode == "disabled" -%}
        {{- "</mm:think>" -}}
    {%- endif -%}
{%- endif -%}
"""
