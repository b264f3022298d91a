"""Several processes sharing one model: how work is split and how partial results meet."""
