"""covey's edge agent: trains where the data are and takes part in rounds over MQTT. Never imports TensorFlow."""

from covey_protocol import __version__

__all__ = ["__version__"]
