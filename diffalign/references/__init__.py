"""What a policy is compared with. Each file's class is its config section; `bind(policy)` makes it ready."""
