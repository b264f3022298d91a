"""The KV cache: how a row of keys or values is stored, and the pages that hold the rows."""
