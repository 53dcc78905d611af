"""The PyTorch baseline: HyperSteer as its two public releases compute it, eager, on `transformers`' Gemma-2.

Written to be compared with, number by number and second by second, not to be used. It wastes what the releases waste:

| | `release` (AxBench at dc57b9b) | `hyperstuff` (HyperStuff/hypersteer) |
| --- | --- | --- |
| base passes per step | 2: context, steered | 3: context, unsteered (nothing reads it), steered |
| attention mask of the context pass | prompt tokens | all tokens |
| steering prompt embedded by | the hypernetwork's own table, trained | the base LM's table; an own one exists, unused |
| hypernetwork, width apart | the base LM's sizes | 16 query and key heads, MLP 24,576, scale 224^-0.5 |
| global clip | 1.0, once | 100, in two passes over all gradients |

Both run whole passes with all logits in float32, and read the context from the states of all blocks. Both pad rows to
the longest of the batch, prompt and response on the right with at least one pad, steering prompts on the left, and turn
cross-attention queries by their index in the padded row. The loss is the token-mean cross-entropy of the response; the
optimizer is PyTorch's AdamW without weight decay, the learning rate falling linearly to zero.

Left out, to the baseline's advantage: the releases' anomaly detection, cache emptying after each step, steered
positions as Python lists, and key/value caches in the hypernetwork. Their selection head is here without its noise and
without its annealing (`selection.py`), their other variants are not. Instead of pyvene there is one forward hook;
transformers is 5.x instead of 4.45.1.

Weights and batches come from outside: `hypernet.load_hypernet` takes the tensors that
`hypersteer_jax.models.weights.hypernet_tensors` gives, `steering.release_batch` takes a `SteeringBatch`. Everything is
in the one dtype and, under `torch.set_default_device`, on the one device that they are loaded to.

    python -m hypersteer_jax.pytorch_baseline.golden DIR  # the release's recorded numbers; exit status 1 if they differ

Needs the extra `[torch]`. Expected: every row agrees, within 5e-6.
"""
