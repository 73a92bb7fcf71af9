"""The target's and the draft's protocol as state machines without I/O."""
