"""Reward scorers: a picture and its prompt to a number, higher is better. One file per scorer."""
