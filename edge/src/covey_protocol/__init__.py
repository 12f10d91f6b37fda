"""covey's shared floor: messages, codec, topics, both state tables, seals, bundles. No I/O.

docs/protocol.md is the specification this package implements.
"""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
