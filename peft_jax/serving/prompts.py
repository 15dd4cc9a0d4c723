"""From texts and messages to tokens, by the model's own tokenizer and chat template."""

from collections.abc import Sequence
from typing import Any

import jinja2

from peft_jax.serving.protocol import Ask
from peft_jax.serving.requests import Refused


def tokenise(tokenizer: Any, ask: Ask, context: int) -> list[tuple[tuple[int, ...], int]]:
    """The prompts' tokens, and how many tokens each may generate: what was asked, or what the context leaves.

    A prompt's special tokens are added as the tokenizer does; a chat's stand in its template.

    Raises:
        Refused: on an empty prompt, on one that leaves no room for what was asked, and where the tokenizer has no
            template or the template will not take the messages.
    """
    if ask.messages is not None:
        prompts = [(chat(tokenizer, ask.messages), "messages")]
    else:
        prompts = [
            (prompt if isinstance(prompt, tuple) else tuple(tokenizer(prompt)["input_ids"]), "prompt")
            for prompt in ask.prompts
        ]
    found = []
    for prompt, param in prompts:
        if not prompt:
            raise Refused(f"{param} has no token.", param=param)
        most = context - len(prompt) if ask.max_tokens is None else ask.max_tokens
        if most < 1 or len(prompt) + most > context:
            asked = "" if ask.max_tokens is None else f" and {ask.max_tokens} to generate"
            raise Refused(
                f"The context holds {context} tokens, and {len(prompt)} of {param}{asked} do not fit.",
                param=param,
                code="context_length_exceeded",
            )
        found.append((prompt, most))
    return found


def chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """A conversation's tokens, up to where the assistant's answer begins.

    Raises:
        Refused: without a template, or where it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise Refused("The model has no chat template: use /v1/completions.", code="no_chat_template")
    try:
        tokens = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except jinja2.TemplateError as error:
        raise Refused(f"The chat template refuses the messages: {error}.", param="messages") from None
    return tuple(tokens)
