"""An artifact as a service: Open Inference Protocol v2 over HTTP and gRPC, batched under deadlines.

The life of a request: ``app`` or ``rpc`` read it, ``protocol`` makes arrays of it, ``served`` hands those to the
batcher of its model, which admits it or refuses it at once; an instance in the model's engine process (``remote``,
``child``) runs it with others, and its own rows go back the same way.
"""
