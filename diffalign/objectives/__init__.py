"""Losses: pure arithmetic on `Likelihoods`. One file per objective; the tests' laws pick up new files by themselves."""
