"""What a device can tell of itself: power, warmth, network, load. One module per thing that is asked.

Everything is read below a root ("/" on a device, a made-up tree in tests) or printed by a command. None means that
there is no such sensor, or that it says nothing of use; nothing here takes a decision.
"""
