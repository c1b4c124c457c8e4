"""The verbs as loops over the seams: generate, score, label, train, evaluate, export, check, demo."""
