"""A Flower app over a network whose clients do no local work: FedAvg on an adapter, empty rounds, or one large update.

torch is imported by the functions that use it, so that empty rounds do not pay for it.
"""
