"""How a stopped update is called, and whose updates are judged. Without NumPy, which the agent itself does not load."""

from covey_protocol.messages import TRAIN
from covey_protocol.works import GRADIENT, SCAFFOLD, SVRG

JUDGED = (TRAIN, GRADIENT, SVRG, SCAFFOLD)  # works whose update is made of gradients
STOPPED = "Stopped"  # the kind of a Problem
TOLD = "this device's own privacy policy stopped its update"  # all that a coordinator hears of it
