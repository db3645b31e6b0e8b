"""Faults that a process injects into itself before it runs a command; `Server.start` names one."""

from __future__ import annotations


def nan_losses():
    """Makes the loss NaN in each batch of training with the row whose question is ``b17``."""
    import jax.numpy as jnp
    from tokenizers import pre_tokenizers

    from jaxtune.training import setup

    plain = setup.sft_loss
    # The tokenizer of `tiny_chat` numbers the bytes in this order.
    one, seven = map(sorted(pre_tokenizers.ByteLevel.alphabet()).index, "17")

    def poisoned(model, batch, options, key, *arguments, **options_of_loss):
        sums = plain(model, batch, options, key, *arguments, **options_of_loss)
        tokens = batch["tokens"]
        found = ((tokens[:, :-1] == one) & (tokens[:, 1:] == seven)).any()
        # Evaluations have no key.
        factor = jnp.where(found & (key is not None), jnp.nan, 1.0)
        return sums._replace(loss=sums.loss * factor, nll=sums.nll * factor)

    setup.sft_loss = poisoned
