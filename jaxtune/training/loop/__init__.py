"""The loop over the steps of a run, and what happens between them."""
