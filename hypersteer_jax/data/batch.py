"""What a row of text and a batch of tokens are. Every other part of the project meets the data in these two types.

Letters: B batch, T prompt and response, C leading columns that can hold prompt tokens, R response, P steering prompt.
"""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int


class DataError(ValueError):
    """The data cannot be used; the message names the file, the row, the column, the value and the fix."""


class SteeringExample(NamedTuple):
    """One training example as text."""

    steering_prompt: str  # what to steer to, read by the hypernetwork
    prompt: str  # the user's instruction, without chat template
    response: str  # what the steered LM should say
    concept: str  # examples of one concept stay on one side of the held-out split
    factor: float = 1.0  # multiplies the steering vector


class SteeringBatch(NamedTuple):
    """One batch of one static shape: numpy on the host, jax arrays on devices. Integers int32, factor float32.

    Rows of `tokens` are padded on the right, so prompt tokens are columns 0 to prompt length - 1. Rows of
    `concept_tokens` are padded on the left, so the last column is the last real token, which the hypernetwork reads.
    """

    tokens: Int[Any, "B T"]  # prompt, then response
    mask: Bool[Any, "B T"]  # real tokens
    steer_mask: Bool[Any, "B T"]  # positions the vector is added to
    context_mask: Bool[Any, "B C"]  # prompt tokens, which the hypernetwork attends to
    response_index: Int[Any, "B R"]  # column whose logits predict the response token; 0 in padding
    response_tokens: Int[Any, "B R"]
    response_mask: Bool[Any, "B R"]  # response tokens that the loss counts
    concept_tokens: Int[Any, "B P"]
    concept_mask: Bool[Any, "B P"]
    factor: Float[Any, " B"]
