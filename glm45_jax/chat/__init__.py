"""Chat: messages to text, ids and loss mask; a model's text to reasoning, content and tool calls.

`render`, `encode`, `bridge` write (template.py), `parse` and `Stream` read (parser.py). Messages,
tools and calls are JSON values as in the OpenAI API. Source: spec 4.
"""

from glm45_jax.chat.parser import (
    PUBLISHED,
    STREAMED,
    Delta,
    Parsed,
    Reading,
    Stream,
    ToolCall,
    joined,
    parse,
)
from glm45_jax.chat.template import FAMILIES, Encoded, Message, bridge, encode, render

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "STREAMED",
    "Delta",
    "Encoded",
    "Message",
    "Parsed",
    "Reading",
    "Stream",
    "ToolCall",
    "bridge",
    "encode",
    "joined",
    "parse",
    "render",
]
