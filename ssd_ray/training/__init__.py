"""Training models that serve together: a draft for any target, and the recipe's steps that any pair needs."""
