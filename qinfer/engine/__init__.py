"""The loop that turns a model into text: sequences, scheduling, sampling, streaming.

Nothing is re-exported here, so that `engine.pages` can be imported without torch.
"""
