"""Log-likelihoods of images or sampler steps: nothing else in training calls the network."""
