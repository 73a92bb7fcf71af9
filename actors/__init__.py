"""The target and the draft as plain classes: a session, a model runner and a channel put together."""
