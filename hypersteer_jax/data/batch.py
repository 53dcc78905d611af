"""What a row of text and a batch of tokens are. Every other part of the project meets the data in these two types.

Letters: B rows of the batch, S sequences (one or two rows each, in order, so B is S or 2S), T length of a sequence, C
context of a row, R scored tokens of a sequence, U steering prompts, P their length.
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
    feature: str = ""  # SAE feature that the concept describes, where the data tells; see data/concepts.py


class SteeringBatch(NamedTuple):
    """One batch of one static shape: numpy on the host, jax arrays on devices. Integers int32, the others float32.

    A sequence holds its rows one behind the other, each prompt and then response, and is padded on the right. Steering
    prompts are padded on the left, so the last column is the last real token, which the hypernetwork reads.
    """

    tokens: Int[Any, "S T"]
    segments: Int[Any, "S T"]  # whose token it is: 1 the first row of the sequence, 2 the second, 0 nobody's (padding)
    steer_mask: Bool[Any, "S T"]  # positions the vector is added to
    context_index: Int[Any, "B C"]  # columns of the row's prompt, which the hypernetwork attends to; 0 in padding
    context_mask: Bool[Any, "B C"]
    response_index: Int[Any, "S R"]  # column whose logits predict the response token; 0 in padding
    response_tokens: Int[Any, "S R"]
    response_share: Float[Any, "S R"]  # 1 / response tokens of its row: what a token weighs there; 0 in padding
    concept_tokens: Int[Any, "U P"]
    concept_mask: Bool[Any, "U P"]
    concept_row: Int[Any, " B"]  # which of the steering prompts is this row's; 0, 1, ... where there is a context
    factor: Float[Any, " B"]
    row: Int[Any, " B"]  # its place in the data, for caches

    @property
    def mask(self) -> Bool[Any, "S T"]:
        """Real tokens."""
        return self.segments > 0

    @property
    def response_mask(self) -> Bool[Any, "S R"]:
        """Response tokens that the loss counts."""
        return self.response_share > 0
