"""Who is compared with whom: where the batches of a training run come from."""
