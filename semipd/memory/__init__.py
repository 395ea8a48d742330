"""The pool of KV blocks: who owns which block, what is cached, and the tensors behind it."""
