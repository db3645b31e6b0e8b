"""Settings that the LoRA recipes share; a recipe sets its model and data and changes the rest.

The lengths of the run and its warm-up follow from the data: two epochs, of which the first 5 % are
warm-up. Batches have 16 rows.
"""

import ml_collections

from jaxtune import config


def get_config() -> ml_collections.ConfigDict:
    """Returns the shared settings."""
    c = config.default()
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.training.batch_size = 16
    c.training.epochs = 2
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 0.05
    return c
