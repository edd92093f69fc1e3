"""The class that Ray Serve makes replicas of; by its name here, so that no code of it is sent to nodes.

Imported where Ray Serve is, and nowhere before.
"""

from ray import serve

from corewise.cluster.replica import Replica


@serve.ingress()
class Ingress(Replica):
    """A replica with the calls that Ray Serve adds."""
